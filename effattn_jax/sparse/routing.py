"""Routing Transformer: attention inside clusters of queries and keys (Roy et al. 2020, arXiv:2003.05997).

A centroid mu_c takes the w queries and the w keys that are nearest to it in direction, over the whole row, and these
queries read these keys. A query that several centroids take gets the mean of what it reads; one that none takes gets 0.
Which tokens a centroid takes depends on all tokens of the row: rows are not strictly causal, as the authors accept.
"""

import functools

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.typing import Array, Float, Int

Centroids = Float[Array, "H N K"]


def routing_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    centroids: Centroids,
    *,
    window: int,
    causal: bool = True,
    memory: tuple[Float[Array, "H M K"], Float[Array, "H M V"]] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """o_i = mean over the centroids that take i of softmax_j(scale * q_i . k_j) v_j over the keys they take.

    Args:
      q, k, v: [B, T, H, K], [B, T, H, K] and [B, T, H, V].
      centroids: [H, N, K], without gradient: `update_centroids` moves them.
      window: w, queries and keys that a centroid takes; T / N or so.
      causal: read keys at the query's position and before only.
      memory: M learned keys and values of each head, read in every cluster, so that no query there reads nothing.
      segment_ids: [B, T] documents of packed rows, whose tokens read each other only. Clusters are shared by them.
      scale: factor on the logits; None means K**-0.5.

    Returns:
      out [B, T, H, V] in q's dtype. A query that reads nothing in a cluster has 0 there.

    Raises:
      ValueError: shapes, dtypes or sizes that do not fit.
    """
    check_qkv(q, k, v)
    check_numbers(scale, None)
    batch, length, heads, key_dim = q.shape
    checks.check_shape("k", k, (batch, length, heads, key_dim), "[B, T, H, K]")
    checks.check_shape("centroids", centroids, (heads, None, key_dim), "[H, N, K]")
    checks.check_segment_ids(segment_ids, batch, length)
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        checks.fail("window", window, "an int of at least 1")
    if memory is not None:
        checks.check_shape("memory", memory[0], (heads, None, key_dim), "[H, M, K]")
        checks.check_shape("memory", memory[1], (heads, memory[0].shape[1], v.shape[-1]), "[H, M, V]")
    if length == 0:
        return jnp.zeros_like(q, shape=(batch, length, heads, v.shape[-1]))
    ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    real = (ids >= 0)[:, :, None, None]
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    scale = key_dim**-0.5 if scale is None else float(scale)
    of_head = functools.partial(_of_head, min(window, length), causal, scale)
    of_heads = jax.vmap(of_head, in_axes=(1, 1, 1, 0, 0, None), out_axes=1)
    return jax.vmap(of_heads, in_axes=(0, 0, 0, None, None, 0))(q, k, v, centroids, memory, ids)


def _of_head(
    window: int,
    causal: bool,
    scale: float,
    q: Float[Array, "T K"],
    k: Float[Array, "T K"],
    v: Float[Array, "T V"],
    centroids: Float[Array, "N K"],
    memory: tuple[Array, Array] | None,
    ids: Int[Array, " T"],
) -> Float[Array, "T V"]:
    accumulate = accumulation_dtype(q.dtype)

    def taken(x: Float[Array, "T K"]) -> Int[Array, "N w"]:
        nearness = contract("nk,tk->nt", unit(centroids.astype(accumulate)), unit(x.astype(accumulate)))
        return jax.lax.top_k(jnp.where(ids >= 0, jax.lax.stop_gradient(nearness), -jnp.inf), window)[1]

    of_q, of_k = taken(q), taken(k)
    i, j = of_q[:, :, None], of_k[:, None, :]
    may_read = (ids[i] == ids[j]) & (ids[j] >= 0)
    if causal:
        may_read &= j <= i
    keys, values = k[of_k], v[of_k]
    if memory is not None:
        keys, values = (
            jnp.concatenate([jnp.broadcast_to(m.astype(x.dtype), (x.shape[0], *m.shape)), x], axis=1)
            for m, x in zip(memory, (keys, values), strict=True)
        )
        always = jnp.ones((*may_read.shape[:2], memory[0].shape[0]), bool)
        may_read = jnp.concatenate([always, may_read], axis=-1)
    s = scale * contract("nik,njk->nij", q[of_q], keys)
    top = jnp.max(jnp.where(may_read, s, -jnp.inf), axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0, top))
    p = jnp.where(may_read, jnp.exp(jnp.where(may_read, s - top, 0)), 0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    out = contract("nij,njv->niv", p / jnp.where(total == 0, 1, total), values.astype(accumulate))
    times = jnp.zeros(q.shape[0], accumulate).at[of_q].add(jnp.where(ids[of_q] >= 0, 1, 0).astype(accumulate))
    summed = jnp.zeros((q.shape[0], v.shape[-1]), accumulate).at[of_q].add(jnp.where(ids[i] >= 0, out, 0))
    return (summed / jnp.maximum(times, 1)[:, None]).astype(q.dtype)


def unit(x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    return x / jnp.where(norm == 0, 1, norm)


def nearest(x: Float[Array, "B T H K"], centroids: Centroids) -> Int[Array, "B T H"]:
    """The centroid that is nearest in direction."""
    accumulate = accumulation_dtype(x.dtype)
    near = contract("bthk,hnk->bthn", unit(x.astype(accumulate)), unit(centroids.astype(accumulate)))
    return jnp.argmax(near, axis=-1)


def commitment_loss(
    x: Float[Array, "B T H K"], centroids: Centroids, *, segment_ids: Int[Array, "B T"] | None = None
) -> Float[Array, ""]:
    """Mean squared distance of unit tokens to their unit centroid, which has no gradient. The authors weigh it 1e-4."""
    centers = jax.lax.stop_gradient(unit(centroids.astype(accumulation_dtype(x.dtype))))
    own = jax.vmap(lambda c, i: c[i], in_axes=(0, 2), out_axes=2)(centers, nearest(x, centroids))
    squares = jnp.square(unit(x.astype(own.dtype)) - own)
    if segment_ids is None:
        return jnp.mean(squares)
    real = jnp.broadcast_to((segment_ids >= 0)[:, :, None, None], squares.shape)
    return jnp.sum(jnp.where(real, squares, 0)) / jnp.maximum(jnp.sum(real), 1)


def update_centroids(
    centroids: Centroids,
    x: Float[Array, "B T H K"],
    *,
    decay: float = 0.999,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Centroids:
    """mu_c <- decay mu_c + (1 - decay) mean of the unit tokens nearest to c; where there are none mu_c stays."""
    accumulate = accumulation_dtype(x.dtype)
    which = jax.nn.one_hot(nearest(x, centroids), centroids.shape[1], dtype=accumulate)
    if segment_ids is not None:
        which *= (segment_ids >= 0)[:, :, None, None]
        x = jnp.where((segment_ids >= 0)[:, :, None, None], x, 0)
    count = jnp.einsum("bthn->hn", which)[..., None]
    mean = contract("bthn,bthk->hnk", which, unit(x.astype(accumulate))) / jnp.maximum(count, 1)
    moved = decay * centroids + (1 - decay) * mean
    return jax.lax.stop_gradient(jnp.where(count > 0, moved, centroids).astype(centroids.dtype))
