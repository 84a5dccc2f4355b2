"""Reformer: attention among tokens that a random hash puts side by side (Kitaev et al. 2020, arXiv:2001.04451).

Keys are the queries, made unit: k_j = x_j / |x_j|. A round r hashes every token by random rotations R_r,

    bucket(x) = argmax [x R_r; -x R_r],

sorts the tokens by bucket and position, and cuts them into chunks; a chunk reads itself and the chunk before it. (The
first chunk has none before it; in the authors' code it reads the last chunk of another round.) A token reads itself
only where there is nothing else, in any round. Rounds are joined by their log-sum-exps; a pair that meets in c rounds
counts c times, or once with `count_once`. Where a chunk ends depends on all tokens of the row: rows are not strictly
causal.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.sparse.arguments import check_numbers
from effattn_jax.sparse.merge import merge
from effattn_jax.typing import Array, Bool, Float, Int


def random_rotations(
    key: Array, rounds: int, key_dim: int, buckets: int, dtype: Any = jnp.float32
) -> Float[Array, "R K N/2"]:
    """Directions of `buckets` buckets, an even number, for each round."""
    if buckets < 2 or buckets % 2:
        checks.fail("buckets", buckets, "an even number of at least 2")
    return jax.random.normal(key, (rounds, key_dim, buckets // 2), dtype)


def reformer_attention(
    qk: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    rotations: Float[Array, "R K N/2"],
    *,
    bucket_size: int = 64,
    causal: bool = True,
    same_bucket: bool = False,
    count_once: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """o_i = sum_j e^{s_ij} v_j / sum_j e^{s_ij}, s_ij = scale * x_i . x_j / |x_j|, over the tokens that i meets.

    Args:
      qk: [B, T, H, K] queries, and keys once they are unit.
      v: [B, T, H, V] values.
      rotations: [R, K, N / 2] of R rounds and N buckets, T / bucket_size or so (`random_rotations`); they have no
        gradient, nor has what they choose.
      bucket_size: tokens of a chunk. T need not be a multiple: what is missing is padding.
      causal: read the token's position and before only.
      same_bucket: read tokens of the same bucket only.
      count_once: a pair counts once in however many rounds it meets.
      segment_ids: [B, T] documents of packed rows; tokens of other documents may be met but are not read.
      scale: factor on the logits; None means K**-0.5.

    Returns:
      out [B, T, H, V] in v's dtype.

    Raises:
      ValueError: shapes, dtypes or sizes that do not fit.
    """
    for name, x, letters in (("qk", qk, "[B, T, H, K]"), ("v", v, "[B, T, H, V]")):
        checks.check_rank(name, x, 4, letters)
        checks.check_floating(name, x)
    batch, length, heads, key_dim = qk.shape
    checks.check_shape("v", v, (batch, length, heads, None), "[B, T, H, V]")
    checks.check_shape("rotations", rotations, (None, key_dim, None), "[R, K, N / 2]")
    checks.check_segment_ids(segment_ids, batch, length)
    check_numbers(scale, None)
    if isinstance(bucket_size, bool) or not isinstance(bucket_size, int) or bucket_size < 1:
        checks.fail("bucket_size", bucket_size, "an int of at least 1")
    if length == 0:
        return jnp.zeros_like(v)

    accumulate = accumulation_dtype(qk.dtype)
    scale = key_dim**-0.5 if scale is None else float(scale)
    ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    real = (ids >= 0)[:, :, None, None]
    qk, v = jnp.where(real, qk, 0), jnp.where(real, v, 0)
    by_row = functools.partial(_of_row, bucket_size, causal, same_bucket, count_once, scale)
    of_heads = jax.vmap(by_row, in_axes=(1, 1, None, None), out_axes=1)
    out = jax.vmap(of_heads, in_axes=(0, 0, None, 0))(qk.astype(accumulate), v, rotations.astype(accumulate), ids)
    return jnp.where(real, out, 0).astype(v.dtype)


def _of_row(
    size: int,
    causal: bool,
    same_bucket: bool,
    count_once: bool,
    scale: float,
    x: Float[Array, "T K"],
    v: Float[Array, "T V"],
    rotations: Float[Array, "R K N/2"],
    ids: Int[Array, " T"],
) -> Float[Array, "T V"]:
    """One head of one row."""
    length = x.shape[0]
    padded = -(-length // size) * size
    pad = lambda y, fill=0: jnp.pad(  # noqa: E731
        y, ((0, padded - length), *((0, 0),) * (y.ndim - 1)), constant_values=fill
    )
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    k = x / jnp.where(norm == 0, 1, norm)
    x, k, v, ids = pad(x), pad(k), pad(v), pad(ids, -1)

    bucket = _buckets(x, rotations)  # [R, T]
    order = jnp.argsort(bucket, axis=-1, stable=True)  # padding may be anywhere: it is not read
    place = jnp.argsort(order, axis=-1)  # of a token among the sorted ones
    chunk = place // size

    def of_round(r: Array) -> tuple[Array, Array]:
        mine = order[r].reshape(-1, size)
        ahead = jnp.concatenate([jnp.zeros_like(mine[:1]), mine[:-1]])
        theirs = jnp.concatenate([ahead, mine], axis=1)
        i, j = mine[:, :, None], theirs[:, None, :]
        may_read = (ids[i] == ids[j]) & (ids[j] >= 0) & (i != j)
        may_read &= (jnp.arange(mine.shape[0])[:, None, None] > 0) | (jnp.arange(2 * size) >= size)
        if causal:
            may_read &= j <= i
        if same_bucket:
            may_read &= bucket[r][i] == bucket[r][j]
        s = scale * contract("nik,njk->nij", x[mine], k[theirs])
        if count_once:
            s -= jnp.log(jnp.maximum(1, _meetings(i, j, chunk, bucket if same_bucket else None))).astype(s.dtype)
        out, lse = _softmax(s, may_read, v[theirs])
        return out.reshape(padded, -1)[place[r]], lse.reshape(padded)[place[r]]

    outs, lses = jax.lax.map(of_round, jnp.arange(rotations.shape[0]))
    out, lse = merge(list(outs[:, None, :, None]), list(lses[:, None, :, None]))
    return jnp.where(jnp.isneginf(lse[0, :, 0])[:, None], v.astype(out.dtype), out[0, :, 0])[:length]


def _buckets(x: Float[Array, "T K"], rotations: Float[Array, "R K N/2"]) -> Int[Array, "R T"]:
    turned = contract("tk,rkn->rtn", jax.lax.stop_gradient(x), jax.lax.stop_gradient(rotations))
    return jnp.argmax(jnp.concatenate([turned, -turned], axis=-1), axis=-1)


def _meetings(
    i: Int[Array, "N C 1"], j: Int[Array, "N 1 D"], chunk: Int[Array, "R T"], bucket: Int[Array, "R T"] | None
) -> Float[Array, "N C D"]:
    """The number of rounds in which i reads the chunk of j."""

    def add(total: Array, of: tuple[Array, Array | None]) -> tuple[Array, None]:
        chunk, bucket = of
        ahead = chunk[i] - chunk[j]
        met = (ahead == 0) | (ahead == 1)
        return total + (met if bucket is None else met & (bucket[i] == bucket[j])), None

    zeros = jnp.zeros(jnp.broadcast_shapes(i.shape, j.shape), chunk.dtype)
    return jax.lax.scan(add, zeros, (chunk, bucket))[0].astype(jnp.float32)


def _softmax(
    s: Float[Array, "N C D"], may_read: Bool[Array, "N C D"], v: Float[Array, "N D V"]
) -> tuple[Float[Array, "N C V"], Float[Array, "N C"]]:
    top = jnp.max(jnp.where(may_read, s, -jnp.inf), axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0, top))
    p = jnp.where(may_read, jnp.exp(jnp.where(may_read, s - top, 0)), 0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]
    return contract("nij,njv->niv", p / total, v.astype(p.dtype)), lse
