"""Longformer: a window on both sides, and global tokens that read all and are read by all (arXiv:2004.05150)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.sparse.block_attention import block_attention, distinct
from effattn_jax.sparse.block_lists import block_lists
from effattn_jax.sparse.documents import real_only
from effattn_jax.sparse.listed_masks import Documents
from effattn_jax.sparse.masks import Mask, Window, check_count
from effattn_jax.sparse.merge import merge
from effattn_jax.sparse.spans import NARROW
from effattn_jax.typing import Array, Float, Int, Queries

BLOCK = 64  # of queries, and of keys
QKV = tuple[Float[Array, "T H K"], Float[Array, "M G K"], Float[Array, "M G V"]]


def longformer_attention(
    q: Queries,
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    global_positions: Int[Array, "B n"],
    *,
    window: int = 256,
    q_global: Float[Array, "B T H K"] | None = None,
    k_global: Float[Array, "B M G K"] | None = None,
    v_global: Float[Array, "B M G V"] | None = None,
    segment_ids: Int[Array, "B M"] | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T H V"]:
    """o_i = sum_j e^{s_ij} v_j / sum_j e^{s_ij}, s_ij = scale * q_i . k_j, over |p_i - j| <= window and the global j.

    A global token i reads all j by projections of its own: s_ij = scale * q_global_i . k_global_j, and v_global_j.
    Not causal. A global token inside of the window counts once. Memory and cost are O(T (window + n) + n M).

    Beltagy et al. 2020, arXiv:2004.05150.

    Args:
      q: [B, T, H, K] queries, the last of the keys' positions: p_i = i + M - T.
      k, v: [B, M, G, K] keys and [B, M, G, V] values, M >= T; G divides H. All rows but the global ones read these,
        those of global tokens, too.
      global_positions: [B, n] positions in the row of global tokens. Order and repetitions change nothing; an entry
        that is no position (-1) names no token.
      window: the paper's, keys on each side: 2 * window + 1 in all.
      q_global, k_global, v_global: like q, k and v, for the rows of global tokens. None: q, k and v.
      segment_ids: [B, M] documents of packed rows, never decreasing along a row; tokens, global ones, too, read their
        own document only. Negative ids mark padding, which is not read and returns 0.
      scale: factor on the logits; None means K**-0.5.
      implementation: see `block_attention`.

    Returns:
      out [B, T, H, V] in q's dtype.

    Raises:
      ValueError: shapes, dtypes or a window that do not fit.
    """
    q_global, k_global, v_global = (y if x is None else x for x, y in ((q_global, q), (k_global, k), (v_global, v)))
    check_qkv(q, k, v)
    check_numbers(scale, None)
    check_count("window", window, 0)
    (batch, length, heads, _), keys = q.shape, k.shape[1]
    for name, x, like in (("q_global", q_global, q), ("k_global", k_global, k), ("v_global", v_global, v)):
        checks.check_shape(name, x, like.shape, f"the shape of {name[0]}")
    checks.check_shape("global_positions", global_positions, (batch, None), "[B, n]")
    if not jnp.issubdtype(jnp.result_type(global_positions), jnp.integer):
        checks.fail("global_positions", f"dtype {jnp.result_type(global_positions)}", "an integer dtype")
    if keys < length:
        checks.fail("k", f"{keys} tokens", f"at least the {length} of q, which are the last of them")
    checks.check_segment_ids(segment_ids, batch, keys)
    if q.size == 0:
        return jnp.zeros_like(q, shape=(batch, length, heads, v.shape[-1]))

    ids = jnp.zeros((batch, keys), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
    own = real_only(q, ids[:, keys - length :]), real_only(k, ids), real_only(v, ids)
    others = real_only(q_global, ids[:, keys - length :]), real_only(k_global, ids), real_only(v_global, ids)
    positions = jnp.asarray(global_positions)
    positions = distinct(jnp.where(positions < 0, keys, positions), keys)
    options: dict[str, Any] = {"causal": False, "scale": scale, "implementation": implementation}

    def of_row(own: QKV, others: QKV, ids: Int[Array, " M"], positions: Int[Array, " n"]) -> Float[Array, "T H V"]:
        near = _near(own, window, ids, positions, options)
        if not positions.size:
            return near[0][0]
        out, _ = merge(*zip(near, _global_keys(own, ids, positions, options), strict=True))
        rows = positions - (keys - length)
        rows = jnp.where(rows < 0, length, rows)  # `length` is no row
        return out[0].at[rows].set(_global_queries(others, ids, positions, rows, options)[0], mode="drop")

    return jax.vmap(of_row)(own, others, ids, positions)


def _near(qkv: QKV, window: int, ids: Array, positions: Array, options: dict[str, Any]) -> tuple[Array, Array]:
    """All queries over the keys of the window that are not global."""
    q, k, v = qkv
    length, keys = q.shape[0], k.shape[0]
    near = Window(window + 1, two_sided=True)
    block = min(BLOCK, length)
    lists = block_lists(near, keys - length, length, keys, block, BLOCK).blocks
    mask = near & Documents(ids, ids.at[positions].set(-1, mode="drop"))
    return _listed(q, k, v, lists, mask, query_block=block, block_size=BLOCK, **options)


def _global_keys(qkv: QKV, ids: Array, positions: Array, options: dict[str, Any]) -> tuple[Array, Array]:
    """All queries over the global keys."""
    q, k, v = qkv
    length, keys = q.shape[0], k.shape[0]
    which = jnp.minimum(positions, keys - 1)
    mask = Documents(ids[keys - length :], jnp.where(positions < keys, ids[which], -1))
    return _everything(q, k[which], v[which], mask, options)


def _global_queries(
    qkv: QKV, ids: Array, positions: Array, rows: Array, options: dict[str, Any]
) -> Float[Array, "1 n H V"]:
    """The global queries, `rows` of this call, over all keys."""
    q, k, v = qkv
    length, keys = q.shape[0], k.shape[0]
    mask = Documents(jnp.where(rows < length, ids[jnp.minimum(positions, keys - 1)], -1), ids)
    return _everything(q[jnp.minimum(rows, length - 1)], k, v, mask, options)[0]


def _everything(q: Array, k: Array, v: Array, mask: Documents, options: dict[str, Any]) -> tuple[Array, Array]:
    """Lists of all blocks; queries and keys have positions of their own, from 0."""
    block, size = min(BLOCK, len(q)), min(BLOCK, -(-len(k) // NARROW) * NARROW)
    lists = np.broadcast_to(np.arange(-(-len(k) // size)), (-(-len(q) // block), -(-len(k) // size)))
    return _listed(q, k, v, lists, mask, offset=0, query_block=block, block_size=size, **options)


def _listed(q: Array, k: Array, v: Array, lists: np.ndarray, mask: Mask, **options: Any) -> tuple[Array, Array]:
    # a sort of constants would be computed by the compiler, slowly
    row = jax.lax.optimization_barrier(jnp.asarray(lists, jnp.int32))
    for_heads = jnp.broadcast_to(row[None, :, None], (1, len(lists), k.shape[1], lists.shape[1]))
    return block_attention(q[None], k[None], v[None], for_heads, mask=mask, **options)
