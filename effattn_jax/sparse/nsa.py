"""Native sparse attention: compressed tokens, selected blocks and a window, each read by a softmax and gated."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.sparse.arguments import check_numbers, check_qkv, check_window
from effattn_jax.sparse.attention import attention
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.compressed import Sizes, check_sizes, overlapping, shares, weights, window_logits
from effattn_jax.sparse.documents import real_only
from effattn_jax.sparse.places import Place, places
from effattn_jax.sparse.pooling import Windows, complete_windows, mean_pool, visible, window_tokens
from effattn_jax.sparse.query_chunks import over_queries
from effattn_jax.sparse.top import check_budget, top_blocks
from effattn_jax.typing import Array, Float, Int, Queries

Phi = Callable[[Float[Array, "B W l G K"]], Float[Array, "B W G K"]]


class KV(NamedTuple):
    """Keys and values of a branch."""

    k: Float[Array, "B M G K"]
    v: Float[Array, "B M G V"]


class Compressed(NamedTuple):
    """A key and a value for each window."""

    k: Float[Array, "B W G K"]
    v: Float[Array, "B W G V"]
    windows: Windows


def nsa_compress(
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    *,
    phi_k: Phi | None = None,
    phi_v: Phi | None = None,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    segment_ids: Int[Array, "B M"] | None = None,
) -> Compressed:
    """k~_c = phi(k_{c s}, ..., k_{c s + l - 1}) of every complete window c of each document, and v~_c alike.

    phi takes windows of tokens side by side, [B, W, l, G, K] -> [B, W, G, K]; None is their mean, in float32.
    """
    windows = complete_windows(k.shape[1], kernel_size, kernel_stride, segment_ids)

    def of(x: Array, phi: Phi | None) -> Array:
        if phi is None:
            return mean_pool(x, windows, kernel_size, kernel_stride, segment_ids)
        x = x if segment_ids is None else real_only(x, jnp.asarray(segment_ids))
        return phi(window_tokens(x, windows, kernel_size))

    return Compressed(of(k, phi_k), of(v, phi_v), windows)


def nsa(
    q: Queries,
    compressed: KV | Compressed,
    selected: KV,
    recent: KV,
    gates: Float[Array, "B T H 3"],
    *,
    phi_k: Phi | None = None,
    phi_v: Phi | None = None,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    topk: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window: int = 512,
    lists: Int[np.ndarray, "n topk"] | None = None,
    segment_ids: Int[Array, "B M"] | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T H V"]:
    """o_t = g_t^cmp o_t^cmp + g_t^slc o_t^slc + g_t^win o_t^win, softmax attention of q_t over three sets:

    compressed tokens of the windows that end at t or before, p_t = softmax(scale * q_t . k~); the tokens up to t of
    topk blocks; the last `window` tokens, t included. The blocks are the first `init_blocks`, the last `local_blocks`
    (the own one counts) and those of the highest scores, summed over the heads of a group,

        score_t[j] = sum_{m < b / s} sum_{n < l / s} p_t[j b / s + m - n]

    for windows of l tokens every s and blocks of b: every window counts as often as it shares a stride with the block.

    Native sparse attention: Yuan et al. 2025, arXiv:2502.11089. Everything has gradients but the choice of blocks,
    which learns by the compressed branch. Cost O(T (M / s + topk b + window)).

    Args:
      q: [B, T, H, K] queries, the last T of the M positions.
      compressed: keys and values [B, M, G, .] to compress, or what `nsa_compress` made of them (with the same sizes and
        documents). Its key heads are the groups that share their blocks.
      selected, recent: keys and values of the other two branches. The paper has a projection for each branch; pass the
        same three times to share.
      gates: [B, T, H, 3] factors of the compressed, the selected and the window's branch; sigmoids, in the paper.
      phi_k, phi_v: see `nsa_compress`.
      kernel_size, kernel_stride: l and s; s divides l and block_size.
      block_size, topk, init_blocks, local_blocks: of the selection; topk counts the forced blocks.
      window: visible keys of the window's branch.
      lists: [n, topk] blocks that queries of block 0, 1, ... read, in place of the choice; -1 for none.
      segment_ids: [B, M] documents of packed rows; windows and blocks are counted from each document's first token.
        Negative ids are padding.
      scale: factor on the logits; None means K**-0.5.
      implementation: of the selected branch, see `block_attention`.

    Returns:
      [B, T, H, V] in q's dtype. Where no window is complete yet, o^cmp = 0.

    Raises:
      ValueError: shapes, dtypes, head counts or sizes that do not fit.
    """
    sizes = Sizes(kernel_size, kernel_stride, block_size)
    check_nsa(q, compressed, selected, recent, gates, sizes, window, scale)
    length, keys = q.shape[1], selected.k.shape[1]
    if lists is None:
        check_budget(topk, init_blocks, local_blocks)
    else:
        checks.check_shape("lists", lists, (-(-keys // block_size), topk), "[n, topk]")
    if keys < length:
        checks.fail("selected", f"{keys} tokens", f"at least the {length} of q, which are the last of them")
    for name, branch in (("compressed", compressed), ("recent", recent)):
        if isinstance(branch, KV):
            checks.check_shape(name, branch.k, (q.shape[0], keys, None, None), "[B, M, G, K]")
    checks.check_segment_ids(segment_ids, q.shape[0], keys)
    if isinstance(compressed, KV):
        compressed = nsa_compress(
            *compressed,
            phi_k=phi_k,
            phi_v=phi_v,
            kernel_size=kernel_size,
            kernel_stride=kernel_stride,
            segment_ids=segment_ids,
        )
    clean = q if segment_ids is None else real_only(q, jnp.asarray(segment_ids)[:, keys - length :])
    place = places(length, keys, segment_ids)
    out, chosen = compressed_branch(
        clean,
        compressed,
        place,
        sizes,
        blocks=-(-keys // block_size),
        scale=scale,
        topk=topk,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
    )
    if lists is not None:
        chosen = jnp.broadcast_to(given_lists(lists, place, block_size), chosen.shape)
    of_blocks, _ = block_attention(
        q,
        *selected,
        chosen,
        block_size=block_size,
        segment_ids=segment_ids,
        scale=scale,
        implementation=implementation,
    )
    near = attention(q, *recent, window=window, segment_ids=segment_ids, scale=scale)
    if segment_ids is not None:
        gates = real_only(gates, jnp.asarray(segment_ids)[:, keys - length :])
    return gated(gates, out, of_blocks, near).astype(q.dtype)


def given_lists(lists: Int[np.ndarray, "n topk"], place: Place, block_size: int) -> Int[Array, "#B T 1 topk"]:
    """The given lists of the blocks that queries are in."""
    given = jnp.asarray(lists, jnp.int32)[jnp.maximum(place.relative, 0) // block_size]
    return jnp.where(place.relative[..., None] < 0, -1, given)[:, :, None]


def gated(gates: Float[Array, "B T H 3"], *outs: Float[Array, "B T H V"]) -> Float[Array, "B T H V"]:
    accumulate = accumulation_dtype(jnp.result_type(gates, *outs))
    weighted = [gates[..., n, None].astype(accumulate) * out.astype(accumulate) for n, out in enumerate(outs)]
    return functools.reduce(jnp.add, weighted)


def compressed_branch(
    q: Queries,
    compressed: Compressed,
    place: Place,
    sizes: Sizes,
    *,
    blocks: int,
    scale: float | None,
    topk: int,
    init_blocks: int,
    local_blocks: int,
) -> tuple[Float[Array, "B T H V"], Int[Array, "B T G topk"]]:
    """Attention over the compressed tokens, and the lists of blocks that its weights choose."""
    batch, _, heads, key_dim = q.shape
    factor = key_dim**-0.5 if scale is None else float(scale)
    common = shares(sizes)

    def of_chunk(q: Array, place: Place) -> tuple[Array, Array]:
        seen = visible(compressed.windows, sizes.kernel, place)
        p = weights(window_logits(q, compressed.k, seen, factor))
        out = contract("bcgrw,bwgv->bcgrv", p, compressed.v.astype(p.dtype)).reshape(*q.shape[:3], -1)
        of_group = jnp.sum(jax.lax.stop_gradient(p), axis=3)
        met = overlapping(of_group, compressed.windows, place, sizes, blocks)
        scores = jnp.sum(met * jnp.asarray(common, met.dtype), axis=-1)
        lists = top_blocks(
            scores,
            place.relative,
            block_size=sizes.block,
            topk=topk,
            init_blocks=init_blocks,
            local_blocks=local_blocks,
        )
        return out, lists

    return over_queries(of_chunk, 2 * batch * heads * compressed.k.shape[1], q, place)


def check_nsa(
    q: Array,
    compressed: KV | Compressed,
    selected: KV,
    recent: KV,
    gates: Array,
    sizes: Sizes,
    window: int,
    scale: float | None,
) -> None:
    for branch in (compressed, selected, recent):
        check_qkv(q, branch.k, branch.v)
    groups, value_dim = compressed.k.shape[2], compressed.v.shape[3]
    checks.check_shape(
        "selected", selected.v, (None, None, groups, value_dim), "v [B, M, G, V] of the compressed branch"
    )
    checks.check_shape("recent", recent.v, (None, None, None, value_dim), "v [B, M, G, V] of the compressed branch")
    checks.check_shape("gates", gates, (*q.shape[:3], 3), "[B, T, H, 3]")
    check_sizes(sizes)
    check_numbers(scale, None)
    check_window(window)
