"""InfLLM-v2: one attention over initial, local and selected blocks, chosen by mean keys; dense while a row is short."""

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.sparse.attention import attention
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.compressed import Sizes, check_sizes, log_sum_exp, overlapping, weights, window_logits
from effattn_jax.sparse.documents import real_only
from effattn_jax.sparse.places import Place, places
from effattn_jax.sparse.pooling import Windows, complete_windows, mean_pool, visible
from effattn_jax.sparse.query_chunks import over_queries
from effattn_jax.sparse.top import check_budget, top_blocks
from effattn_jax.typing import Array, Float, Int, Queries

COARSE = 4  # times as wide and as far apart are the windows of the coarse log-sum-exp

Pooled = tuple[Float[Array, "B W G K"], Windows, int]  # mean keys, their windows, tokens of a window


def infllm2(
    q: Queries,
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    init_blocks: int = 1,
    topk: int = 64,
    window: int = 2048,
    dense_len: int = 8192,
    coarse_lse: bool = False,
    segment_ids: Int[Array, "B M"] | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T H V"]:
    """Softmax attention over the tokens up to the query in topk + window / block_size blocks: the first `init_blocks`,
    the own one and the window / block_size before it, and those of the highest scores

        score_t[j] = max_c sum_h softmax_c(scale * q_th . mean_{i in c} k_i)

    over the windows c that share a token with block j, among those that end at t or before.

    InfLLM-v2: Zhao et al. 2025, arXiv:2509.24663 (MiniCPM4, arXiv:2506.07900). No parameters, one set of keys and
    values, no gradient through the scores. The heads of a group share their blocks.

    Args:
      q: [B, T, H, K] queries, the last T of the M positions. Keys and queries are rotated before, where they are.
      k, v: [B, M, G, K] keys and [B, M, G, V] values; G divides H.
      kernel_size, kernel_stride: tokens of a window, and from one to the next; the stride divides it and block_size.
      block_size: tokens of a block.
      init_blocks, topk, window: budget; `window` in tokens, a multiple of block_size.
      dense_len: rows of M < dense_len tokens are read whole, as by `attention`; -1 or 0: none.
      coarse_lse: normalise the softmax of each head over windows four times as wide and as far apart. Only the weights
        of heads against each other change. Queries that see none of these normalise over what they see.
      segment_ids: [B, M] documents of packed rows; windows and blocks are counted from each document's first token.
        Negative ids are padding. M, not the length of a document, is held against dense_len.
      scale: factor on the logits; None means K**-0.5.
      implementation: see `block_attention`; of rows that are read whole, see `attention`.

    Returns:
      [B, T, H, V] in q's dtype.

    Raises:
      ValueError: shapes, dtypes, head counts or sizes that do not fit.
    """
    sizes = Sizes(kernel_size, kernel_stride, block_size)
    check_infllm2(q, k, v, sizes, init_blocks, topk, window, dense_len, scale)
    if k.shape[1] < dense_len:
        return attention(q, k, v, segment_ids=segment_ids, scale=scale, implementation=implementation)
    lists = infllm2_blocks(
        q,
        k,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        init_blocks=init_blocks,
        topk=topk,
        window=window,
        coarse_lse=coarse_lse,
        segment_ids=segment_ids,
        scale=scale,
    )
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


def infllm2_blocks(
    q: Queries,
    k: Float[Array, "B M G K"],
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    init_blocks: int = 1,
    topk: int = 64,
    window: int = 2048,
    coarse_lse: bool = False,
    segment_ids: Int[Array, "B M"] | None = None,
    scale: float | None = None,
) -> Int[Array, "B T G n"]:
    """The n = topk + window / block_size blocks that `infllm2` reads, counted from the document's first token; -1 where
    there are no more. Has no gradient."""
    sizes = Sizes(kernel_size, kernel_stride, block_size)
    check_infllm2(q, k, k, sizes, init_blocks, topk, window, -1, scale)
    length, keys = q.shape[1], k.shape[1]
    if keys < length:
        checks.fail("k", f"{keys} tokens", f"at least the {length} of q, which are the last of them")
    checks.check_segment_ids(segment_ids, q.shape[0], keys)
    q, k = jax.lax.stop_gradient((q, k))
    if segment_ids is not None:
        q = real_only(q, jnp.asarray(segment_ids)[:, keys - length :])

    def pooled(times: int) -> Pooled:
        tokens, stride = times * kernel_size, times * kernel_stride
        windows = complete_windows(keys, tokens, stride, segment_ids)
        return mean_pool(k, windows, tokens, stride, segment_ids), windows, tokens

    return choose(
        q,
        pooled(1),
        pooled(COARSE) if coarse_lse else None,
        places(length, keys, segment_ids),
        sizes,
        blocks=-(-keys // block_size),
        init_blocks=init_blocks,
        topk=topk,
        window=window,
        scale=scale,
    )


def choose(
    q: Queries,
    fine: Pooled,
    coarse: Pooled | None,
    place: Place,
    sizes: Sizes,
    *,
    blocks: int,
    init_blocks: int,
    topk: int,
    window: int,
    scale: float | None,
) -> Int[Array, "B T G n"]:
    """Lists by mean keys."""
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    means, windows, _ = fine

    def logits(q: Array, place: Place, of: Pooled) -> Float[Array, "B C G R W"]:
        return window_logits(q, of[0], visible(of[1], of[2], place), factor)

    def of_chunk(q: Array, place: Place) -> Array:
        s = logits(q, place, fine)
        if coarse is None:
            p = weights(s)
        else:
            lse = log_sum_exp(logits(q, place, coarse))
            s -= jnp.where(jnp.isneginf(lse), 0, lse)
            # a factor that heads and windows share changes no order: the highest is 1
            top = jnp.max(s, axis=(3, 4), keepdims=True)
            own = weights(s)
            p = jnp.where(jnp.isneginf(lse), own, jnp.exp(s - jnp.where(jnp.isneginf(top), 0, top)))
        met = overlapping(jnp.sum(p, axis=3), windows, place, sizes, blocks)
        local = window // sizes.block
        return top_blocks(
            jnp.max(met, axis=-1),
            place.relative,
            block_size=sizes.block,
            topk=topk + local,
            init_blocks=init_blocks,
            local_blocks=local + 1,
        )

    return over_queries(of_chunk, 2 * q.shape[0] * q.shape[2] * means.shape[1], q, place)


def check_infllm2(
    q: Array,
    k: Array,
    v: Array,
    sizes: Sizes,
    init_blocks: int,
    topk: int,
    window: int,
    dense_len: int,
    scale: float | None,
) -> None:
    check_qkv(q, k, v)
    check_numbers(scale, None)
    check_sizes(sizes)
    if isinstance(window, bool) or not isinstance(window, int) or window < 0 or window % sizes.block:
        checks.fail("window", window, f"a multiple of the block size of {sizes.block}")
    if isinstance(dense_len, bool) or not isinstance(dense_len, int):
        checks.fail("dense_len", dense_len, "an int")
    local = window // sizes.block
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < init_blocks + 1:
        checks.fail("topk", topk, f"an int of at least {init_blocks + 1}, the initial blocks and the query's own")
    check_budget(topk + local, init_blocks, local + 1)
