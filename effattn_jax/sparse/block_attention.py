"""Softmax attention that reads the blocks of keys on a list: the executor that every selector shares."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation, dispatch, platform
from effattn_jax.precision import accumulation_dtype
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.sparse.documents import first_tokens, real_only
from effattn_jax.sparse.marked import marked_attention
from effattn_jax.sparse.spans import Keys, Plan, Rows, span_attention
from effattn_jax.typing import Array, Bool, Float, Int, Queries

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array]]] = {"xla": span_attention, "dense": marked_attention}
MANY, PAIRS = 64, 256  # lists of a row, and logits that a GPU makes while it gathers one key, see `by_cost`


def block_attention(
    q: Queries,
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    block_indices: Int[Array, "B N L n"],
    *,
    block_size: int,
    query_block: int = 1,
    causal: bool = True,
    offset: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    mask: Any = None,
    key_mask: Bool[Array, "B L M"] | None = None,
    segment_ids: Int[Array, "B M"] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """o_i = sum_j e^{s_ij} v_j / sum_j e^{s_ij}, L_i = ln sum_j e^{s_ij} over the keys j of the blocks that i lists.

    s_ij = scale * q_i . k_j. Block n holds the keys n * block_size, ..., (n + 1) * block_size - 1; the last block of a
    row may be shorter. A list is a set: order, repetitions, and entries that name no block (-1) change nothing.

    Args:
      q: [B, T, H, K] queries, at positions offset, offset + 1, ...
      k, v: [B, M, G, K] keys and [B, M, G, V] values, at positions 0, 1, ...; G divides H.
      block_indices: [B, N, L, n] lists of n blocks. N = ceil(T / query_block): list i serves queries
        i * query_block, ... of this call. L divides H and is a multiple of G: a list serves H / L consecutive heads,
        so L = G is a list a group of heads, L = H one a head.
      block_size: tokens in a block of keys; 1 lists tokens.
      query_block: queries that share a list.
      causal: read keys at the query's position and before only.
      offset: position of the first query, alike for all rows or one for each. None: the queries are the last of the
        keys' positions, M - T.
      mask: a mask of positions (see `effattn_jax.sparse.mask`) that must allow a key, too.
      key_mask: [B, L, M], keys that may be read.
      segment_ids: [B, M] documents of packed rows, never decreasing along a row. A query reads its own document, whose
        blocks are counted from its first token. Negative ids are padding, which is not read and returns 0. Needs
        query_block = 1 and offset None.
      scale: factor on the logits; None means K**-0.5.
      logits_soft_cap: c, s <- c tanh(s / c). None is no cap.
      implementation: how it runs, see `effattn_jax.dispatch`. "xla" gathers what is listed, in memory and work linear
        in T; "dense" makes all products under the mask of the lists, in memory linear in T and quadratic work. None
        takes "xla", but on a GPU "dense" where `by_cost` expects it to take less time.

    Returns:
      out [B, T, H, V] in q's dtype and L [B, T, H], both accumulated in float32 (float64 for float64 inputs) and
      differentiable in q, k and v. A row that reads no key has o = 0, L = -inf and no gradients.

    Raises:
      ValueError: shapes, dtypes, head counts or sizes that do not fit.
    """
    check_qkv(q, k, v)
    check_numbers(scale, logits_soft_cap)
    batch, length, heads, key_dim = q.shape
    keys, groups = k.shape[1:3]
    for name, size in (("block_size", block_size), ("query_block", query_block)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            checks.fail(name, size, "an int of at least 1")
    count = -(-length // query_block)
    checks.check_shape("block_indices", block_indices, (batch, count, None, None), "[B, ceil(T / query_block), L, n]")
    if not jnp.issubdtype(jnp.result_type(block_indices), jnp.integer):
        checks.fail("block_indices", f"dtype {jnp.result_type(block_indices)}", "an integer dtype")
    lists = block_indices.shape[2]
    checks.check_head_groups("block_indices", lists, "q", heads)
    if lists % groups:
        checks.fail("block_indices", f"{lists} lists", f"a multiple of the {groups} heads of k")
    if key_mask is not None:
        checks.check_shape("key_mask", key_mask, (batch, lists, keys), "[B, L, M]")
    if offset is None and keys < length:
        checks.fail("k", f"{keys} tokens", f"at least the {length} of q, which are the last of them, or an offset")
    checks.check_segment_ids(segment_ids, batch, keys)
    if segment_ids is not None and (query_block != 1 or offset is not None):
        checks.fail("segment_ids", f"query_block {query_block}, offset {offset}", "query_block 1 and offset None")

    if q.size == 0 or k.size == 0:
        accumulate = accumulation_dtype(q.dtype)
        lse = jnp.full_like(q, -jnp.inf, shape=(batch, length, heads), dtype=accumulate)
        return jnp.zeros_like(q, shape=(batch, length, heads, v.shape[-1])), lse
    first = jnp.asarray(keys - length if offset is None else offset)
    position = jnp.broadcast_to(first[..., None] + jnp.arange(length), (batch, length))
    query_segments = None
    block_indices = jnp.asarray(block_indices)
    block_indices = block_indices.astype(jnp.promote_types(block_indices.dtype, jnp.int32))
    blocks = -(-keys // block_size)  # a larger index times block_size may be no int32
    starts = jnp.where(block_indices < 0, keys, jnp.minimum(block_indices, blocks) * block_size)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        query_segments = segment_ids[:, keys - length :]
        q, k, v = real_only(q, query_segments), real_only(k, segment_ids), real_only(v, segment_ids)
        starts += first_tokens(segment_ids)[:, keys - length :, None, None]
    starts = distinct(starts, keys)[..., :blocks]  # what a longer list gathers would change the order of sums

    per_group, per_list = lists // groups, heads // lists

    def to_rows(x: Float[Array, "B T H ..."]) -> Float[Array, "E X Y ..."]:
        x = jnp.pad(x, ((0, 0), (0, count * query_block - length), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(batch, count, query_block, groups, per_group, per_list, *x.shape[3:])
        x = jnp.moveaxis(x, (3, 4), (1, 3))  # B, G, N, per_group, query_block, per_list
        return x.reshape(batch * groups, count * per_group, query_block * per_list, *x.shape[6:])

    def from_rows(x: Float[Array, "E X Y ..."]) -> Float[Array, "B T H ..."]:
        x = x.reshape(batch, groups, count, per_group, query_block, per_list, *x.shape[3:])
        return jnp.moveaxis(x, (1, 3), (3, 4)).reshape(batch, count * query_block, heads, *x.shape[6:])[:, :length]

    def per_head(x: Int[Array, "B T"]) -> Int[Array, "B T H"]:
        return jnp.broadcast_to(x[:, :, None], (batch, length, heads))

    def per_key_head(x: Array) -> Array:
        return jnp.moveaxis(x, 2, 1).reshape(batch * groups, keys, *x.shape[3:])

    listed = jnp.moveaxis(starts.reshape(batch, count, groups, per_group, -1), 2, 1)
    rows = Rows(
        to_rows(q),
        to_rows(per_head(position)),
        None if query_segments is None else to_rows(per_head(query_segments)),
        listed.reshape(batch * groups, count * per_group, -1),
    )
    of_keys = Keys(
        per_key_head(k),
        per_key_head(v),
        None if segment_ids is None else jnp.repeat(segment_ids, groups, axis=0),
        None if key_mask is None else jnp.asarray(key_mask).reshape(batch * groups, per_group, keys),
        mask,
    )
    plan = Plan(block_size, causal, key_dim**-0.5 if scale is None else float(scale), logits_soft_cap)
    order = by_cost(rows, keys, block_size)
    out, lse = dispatch("block_attention", IMPLEMENTATIONS, implementation, order, plan, rows, of_keys)
    return from_rows(out), from_rows(lse)


def by_cost(rows: Rows, keys: int, block_size: int) -> tuple[str, ...]:
    """What None takes: on a GPU whole products where a list has few queries times keys for each key that it names.

    Measured on an H100 (`experiments.hardware_rules`): a listed key is gathered, forward, in the time of some 256
    logits, and backward in that of more. A few queries that decode make too few products to fill the chip.
    """
    _, lists, queries, listed = (*rows.position.shape, rows.starts.shape[-1])
    cheap = lists >= MANY and queries * keys <= PAIRS * listed * block_size
    return ("dense",) if cheap and platform() == "gpu" else ("xla",)


def distinct(starts: Int[Array, "*lists n"], keys: int) -> Int[Array, "*lists n"]:
    """Ascending, each once; `keys` where there is none."""
    starts = jnp.sort(jnp.minimum(starts, keys), axis=-1)
    again = jnp.concatenate([jnp.zeros_like(starts[..., :1], bool), starts[..., 1:] == starts[..., :-1]], axis=-1)
    return jnp.sort(jnp.where(again, keys, starts), axis=-1)
