"""Softmax attention under a mask of positions: reads the blocks of keys in which the mask allows any pair."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.precision import accumulation_dtype
from effattn_jax.sparse.arguments import check_numbers, check_qkv, check_sinks
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.block_lists import Lists, block_lists, runs
from effattn_jax.sparse.documents import first_tokens, real_only
from effattn_jax.sparse.listed_masks import Documents
from effattn_jax.sparse.masks import Mask, check_count
from effattn_jax.sparse.merge import with_sinks
from effattn_jax.typing import Array, Float, Int, Queries


def masked_attention(
    q: Queries,
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    mask: Mask | Sequence[Mask],
    *,
    query_block: int = 64,
    block_size: int = 64,
    segment_ids: Int[Array, "B M"] | None = None,
    sinks: Float[Array, " H"] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """o_i = sum_j e^{s_ij} v_j / (e^z + sum_j e^{s_ij}), s_ij = scale * q_i . k_j, over the keys j of the mask.

    The queries are the last of the keys' positions: query row i is at p_i = i + M - T. The cost is that of the tiles,
    `query_block` queries by `block_size` keys, in which the mask allows any pair, known at trace time.

    Args:
      q: [B, T, H, K] queries.
      k, v: [B, M, G, K] keys and [B, M, G, V] values, M >= T; G divides H.
      mask: a mask of positions (`effattn_jax.sparse.masks`, `listed_masks`, `patterns`), or one for each of the H
        heads. Heads with equal masks run together, and so do all heads whose masks are made of whole tiles.
      query_block: queries that share a list of blocks.
      block_size: keys in a block; the gradients of blocks below 16 keys cost O(T M).
      segment_ids: [B, M] documents of packed rows, never decreasing along a row; tokens read their own document only,
        and a mask counts positions from its first token. Negative ids mark padding, which is not read and returns 0.
        Masks of distances p - j alone cost what they cost without documents; others run query by query.
      sinks: [H], a logit z per head in the denominator, neither scaled nor masked. None is z = -inf.
      scale: factor on the logits; None means K**-0.5.
      logits_soft_cap: c, s <- c tanh(s / c). None is no cap.
      implementation: see `block_attention`.

    Returns:
      out [B, T, H, V] in q's dtype, and L_i = ln(e^z + sum_j e^{s_ij}) [B, T, H] in float32 (float64 for float64
      inputs). A row that reads no key has o = 0, L = z (-inf without sinks) and no gradients.

    Raises:
      ValueError: shapes, dtypes, head counts, sizes or masks that do not fit.
    """
    check_qkv(q, k, v)
    check_numbers(scale, logits_soft_cap)
    batch, length, heads, _ = q.shape
    keys = k.shape[1]
    check_sinks(sinks, heads)
    check_count("query_block", query_block)
    check_count("block_size", block_size)
    if keys < length:
        checks.fail("k", f"{keys} tokens", f"at least the {length} of q, which are the last of them")
    checks.check_segment_ids(segment_ids, batch, keys)
    masks = [mask] * heads if isinstance(mask, Mask) else list(mask)
    if len(masks) != heads or not all(isinstance(m, Mask) for m in masks):
        checks.fail("mask", f"a sequence of {len(masks)}", f"a mask, or one for each of the {heads} heads of q")
    options: dict[str, Any] = {
        "block_size": block_size,
        "scale": scale,
        "logits_soft_cap": logits_soft_cap,
        "implementation": implementation,
    }
    query_block = max(1, min(query_block, length))
    if q.size == 0:
        out = jnp.zeros_like(q, shape=(*q.shape[:3], v.shape[-1]))
        lse = jnp.full_like(q, -jnp.inf, shape=q.shape[:3], dtype=accumulation_dtype(q.dtype))
    elif segment_ids is None:
        plan = lambda m: block_lists(m, keys - length, length, keys, query_block, block_size)  # noqa: E731
        of_part = functools.partial(_one_document, query_block=query_block, **options)
        out, lse = _by_parts(of_part, _parts(masks, plan), q, k, v)
    else:
        ids = jnp.asarray(segment_ids)
        q, k, v = real_only(q, ids[:, keys - length :]), real_only(k, ids), real_only(v, ids)
        if all(m.relative for m in masks):
            plan = lambda m: block_lists(m, keys - length, length, keys, query_block, block_size)  # noqa: E731
            of_part = functools.partial(_by_distance, ids, query_block=query_block, **options)
        else:
            plan = lambda m: block_lists(m, 0, keys, keys, 1, block_size)  # noqa: E731
            of_part = functools.partial(_by_position, ids, **options)
        out, lse = _by_parts(of_part, _parts(masks, plan), q, k, v)
    return (out, lse) if sinks is None else with_sinks(out, lse, jnp.asarray(sinks))


class Part(NamedTuple):
    """Heads that run together."""

    heads: list[int]
    lists: np.ndarray  # [N, 1, n], one list for all, or [N, heads, n]
    mask: Mask | None  # None where the lists say it all


def _parts(masks: list[Mask], plan: Callable[[Mask], Lists]) -> list[Part]:
    """A part for each mask, but one for all masks that are made of whole tiles."""
    of_mask: dict[Mask, list[int]] = {}
    for head, mask in enumerate(masks):
        of_mask.setdefault(mask, []).append(head)
    listed = {mask: plan(mask) for mask in of_mask}
    parts = [Part(heads, listed[mask].blocks[:, None], mask) for mask, heads in of_mask.items() if listed[mask].partial]
    whole = [mask for mask in of_mask if not listed[mask].partial]
    if len(whole) == 1:
        parts.append(Part(of_mask[whole[0]], listed[whole[0]].blocks[:, None], None))
    elif whole:
        heads = sorted(head for mask in whole for head in of_mask[mask])
        longest = max(listed[mask].blocks.shape[1] for mask in whole)
        pad = lambda x: np.pad(x, ((0, 0), (0, longest - x.shape[1])), constant_values=-1)  # noqa: E731
        parts.append(Part(heads, np.stack([pad(listed[masks[head]].blocks) for head in heads], axis=1), None))
    return parts


def _by_parts(of_part: Callable, parts: list[Part], q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    if len(parts) == 1:
        return of_part(parts[0], q, k, v)
    group = q.shape[2] // k.shape[2]
    outs, lses = [], []
    for part in parts:
        read = [head // group for head in part.heads]
        used = sorted(set(read))
        if len({read.count(head) for head in used}) > 1:
            used = read  # groups of several sizes: keys of their own for every head
        out, lse = of_part(part, *(x[:, :, np.array(which)] for x, which in ((q, part.heads), (k, used), (v, used))))
        outs.append(out)
        lses.append(lse)
    place = np.argsort([head for part in parts for head in part.heads])
    return jnp.concatenate(outs, axis=2)[:, :, place], jnp.concatenate(lses, axis=2)[:, :, place]


def _for_heads(lists: Int[Array, "N L n"], k: Array) -> Int[Array, "N L n"]:
    """A list for each key head, or for each query head."""
    return lists if lists.shape[1] > 1 else jnp.broadcast_to(lists, (lists.shape[0], k.shape[2], lists.shape[2]))


def _one_document(part: Part, q: Array, k: Array, v: Array, *, query_block: int, **options: Any) -> tuple[Array, Array]:
    outs, lses = [], []
    done, before = 0, k.shape[1] - q.shape[1]
    for piece in runs(part.lists):
        queries = q[:, done : done + len(piece) * query_block]
        # a sort of constants would be computed by the compiler, slowly
        lists = jax.lax.optimization_barrier(_for_heads(jnp.asarray(piece), k))
        lists = jnp.broadcast_to(lists, (q.shape[0], *lists.shape))
        options |= {"offset": before + done, "query_block": query_block}
        out, lse = block_attention(queries, k, v, lists, causal=False, mask=part.mask, **options)
        outs.append(out)
        lses.append(lse)
        done += queries.shape[1]
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)


def _by_distance(ids: Array, part: Part, q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    """Positions in the row serve: a mask of distances is the same in every document."""

    def of_row(ids: Array, *row: Array) -> tuple[Array, Array]:
        documents = Documents(ids)
        masked = part._replace(mask=documents if part.mask is None else part.mask & documents)
        out, lse = _one_document(masked, *(x[None] for x in row), **options)
        return out[0], lse[0]

    return jax.vmap(of_row)(ids, q, k, v)


def _by_position(ids: Array, part: Part, q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    """The list of every query is that of its position in its document."""

    def of_row(ids: Array, *row: Array) -> tuple[Array, Array]:
        q, k, v = (x[None] for x in row)
        first = first_tokens(ids[None])[0]
        position = (jnp.arange(len(ids)) - first)[len(ids) - q.shape[1] :]
        lists = _for_heads(jnp.asarray(part.lists)[position], k)[None]
        mask = None if part.mask is None else FromFirst(part.mask, first)
        out, lse = block_attention(q, k, v, lists, causal=False, mask=mask, segment_ids=ids[None], **options)
        return out[0], lse[0]

    return jax.vmap(of_row)(ids, q, k, v)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FromFirst(Mask):
    """A mask whose positions count from the first tokens of documents, first: [M] by position in the row."""

    mask: Mask
    first: Int[Array, " M"]

    def __call__(self, query: Array, key: Array) -> Array:
        key = jnp.minimum(key, len(self.first) - 1)  # a block may reach behind the last
        return self.mask(query - self.first[query], key - self.first[key])
