"""Mixture of block attention: each head of a query reads the blocks whose mean key it likes best, and its own."""

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.documents import real_only
from effattn_jax.sparse.places import Place, places
from effattn_jax.sparse.pooling import Windows, complete_windows, mean_pool, visible
from effattn_jax.sparse.query_chunks import over_queries
from effattn_jax.sparse.top import top_entries
from effattn_jax.typing import Array, Float, Int, Queries


def moba(
    q: Queries,
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    *,
    block_size: int = 512,
    topk: int = 3,
    segment_ids: Int[Array, "B M"] | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T H V"]:
    """Softmax attention over the tokens up to the query in its own block and in the topk - 1 blocks n before it with
    the highest gates q . mean_{j in n} k_j.

    MoBA: Lu et al. 2025, arXiv:2502.13189. No parameters, and no gradient through the gate: q and k learn by the
    attention to what was selected. topk = 1 is attention within blocks. Cost O(T topk block_size + T M / block_size).

    Args:
      q: [B, T, H, K] queries, the last T of the M positions. Keys and queries are rotated before, where they are.
      k, v: [B, M, G, K] keys and [B, M, G, V] values; G divides H. Every query head selects blocks of its own.
      block_size: tokens of a block. The paper has 512 for rows of 8k tokens and 2048 or 4096 for longer ones.
      topk: blocks of a query, its own counted.
      segment_ids: [B, M] documents of packed rows; blocks are counted from each document's first token. Negative ids
        are padding.
      scale: factor on the logits of the attention; None means K**-0.5. Gates have none.
      implementation: see `block_attention`.

    Returns:
      [B, T, H, V] in q's dtype. Gates are computed in float32 (float64 for float64 inputs); of equal ones the earlier
      block is taken.

    Raises:
      ValueError: shapes, dtypes, head counts or sizes that do not fit.
    """
    check_moba(q, k, v, block_size, topk, segment_ids, scale)
    lists = moba_blocks(q, k, block_size=block_size, topk=topk, segment_ids=segment_ids)
    return block_attention(
        q,
        k,
        v,
        lists,
        block_size=block_size,
        segment_ids=segment_ids,
        scale=scale,
        implementation=implementation,
    )[0]


def moba_blocks(
    q: Queries,
    k: Float[Array, "B M G K"],
    *,
    block_size: int = 512,
    topk: int = 3,
    segment_ids: Int[Array, "B M"] | None = None,
) -> Int[Array, "B T H topk"]:
    """The blocks that `moba` reads, counted from the document's first token: the query's own, then the highest gate
    first; -1 where there are no more. Has no gradient."""
    check_moba(q, k, k, block_size, topk, segment_ids, None)
    keys = k.shape[1]
    q, k = jax.lax.stop_gradient((q, k))
    if segment_ids is not None:
        q = real_only(q, jnp.asarray(segment_ids)[:, keys - q.shape[1] :])
    windows = complete_windows(keys, block_size, block_size, segment_ids)
    means = mean_pool(k, windows, block_size, block_size, segment_ids)
    return choose(q, means, windows, places(q.shape[1], keys, segment_ids), block_size, topk)


def choose(
    q: Queries, means: Float[Array, "B W G K"], windows: Windows, place: Place, block_size: int, topk: int
) -> Int[Array, "B T H topk"]:
    """Lists by the means of complete blocks."""
    batch, _, heads, key_dim = q.shape
    groups = means.shape[2]
    block = (windows.start - windows.document) // block_size
    blocks = jnp.broadcast_to(block[:, None, None], (batch, 1, 1, block.shape[1]))

    def of_chunk(q: Array, place: Place) -> Array:
        shared = q.astype(accumulation_dtype(q.dtype)).reshape(*q.shape[:2], groups, heads // groups, key_dim)
        gate = contract("bcgrk,bwgk->bcgrw", shared, means.astype(shared.dtype)).reshape(*q.shape[:3], -1)
        own = (place.relative // block_size)[..., None]
        before = visible(windows, block_size, place) & (block[:, None] < own)  # a block that the query ends is its own
        picks = top_entries(jnp.where(before[:, :, None], gate, -jnp.inf), topk - 1)
        named = jnp.take_along_axis(blocks, jnp.maximum(picks, 0), axis=-1)
        own = jnp.broadcast_to(own[..., None], (*q.shape[:3], 1))
        return jnp.concatenate([own, jnp.where(picks < 0, -1, named)], axis=-1)

    return over_queries(of_chunk, batch * heads * means.shape[1], q, place)


def check_moba(
    q: Array, k: Array, v: Array, block_size: int, topk: int, segment_ids: Array | None, scale: float | None
) -> None:
    check_qkv(q, k, v)
    check_numbers(scale, None)
    for name, size in (("block_size", block_size), ("topk", topk)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            checks.fail(name, size, "an int of at least 1")
    if k.shape[1] < q.shape[1]:
        checks.fail("k", f"{k.shape[1]} tokens", f"at least the {q.shape[1]} of q, which are the last of them")
    checks.check_segment_ids(segment_ids, q.shape[0], k.shape[1])
