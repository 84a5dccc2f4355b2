"""Softmax attention over all keys, the causal past or a sliding window: one function, several implementations."""

from collections.abc import Callable
from typing import Any, Literal, overload

import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.kernels import attention_here
from effattn_jax.sparse.arguments import check_numbers, check_qkv, check_sinks, check_window
from effattn_jax.sparse.cudnn import cudnn
from effattn_jax.sparse.dense import dense
from effattn_jax.sparse.documents import real_only
from effattn_jax.sparse.flash import flash
from effattn_jax.sparse.mosaic import mosaic_gpu
from effattn_jax.sparse.splash import splash
from effattn_jax.typing import Array, Float, Int, Queries

AttentionKeys = Float[Array, "B M G K"]
AttentionValues = Float[Array, "B M G V"]
AttentionOut = Float[Array, "B T H V"]
LogSumExp = Float[Array, "B T H"]

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array | None]]] = {
    "cudnn": cudnn,
    "mosaic_gpu": mosaic_gpu,
    "mosaic_tpu": splash,
    "xla": flash,
    "dense": dense,
}


@overload
def attention(
    q: Queries,
    k: AttentionKeys,
    v: AttentionValues,
    *,
    causal: bool = ...,
    window: int | None = ...,
    sinks: Float[Array, " H"] | None = ...,
    segment_ids: Int[Array, "B M"] | None = ...,
    scale: float | None = ...,
    logits_soft_cap: float | None = ...,
    implementation: Implementation = ...,
    return_lse: Literal[False] = ...,
) -> AttentionOut: ...


@overload
def attention(
    q: Queries,
    k: AttentionKeys,
    v: AttentionValues,
    *,
    causal: bool = ...,
    window: int | None = ...,
    sinks: Float[Array, " H"] | None = ...,
    segment_ids: Int[Array, "B M"] | None = ...,
    scale: float | None = ...,
    logits_soft_cap: float | None = ...,
    implementation: Implementation = ...,
    return_lse: Literal[True],
) -> tuple[AttentionOut, LogSumExp]: ...


def attention(
    q: Queries,
    k: AttentionKeys,
    v: AttentionValues,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: Float[Array, " H"] | None = None,
    segment_ids: Int[Array, "B M"] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    implementation: Implementation = None,
    return_lse: bool = False,
) -> AttentionOut | tuple[AttentionOut, LogSumExp]:
    """o_i = sum_j e^{s_ij} v_j / (e^z + sum_j e^{s_ij}) with s_ij = scale * q_i . k_j, over the keys j that i may read.

    Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie et al. 2023, arXiv:2305.13245; window: Beltagy et al.
    2020, arXiv:2004.05150, and Jiang et al. 2023, arXiv:2310.06825; sink logits z: gpt-oss, arXiv:2508.10925; soft cap:
    Gemma 2, arXiv:2408.00118.

    The queries are the last of the keys' positions: query row i is at p_i = i + M - T.

    Args:
      q: [B, T, H, K] queries.
      k: [B, M, G, K] keys, M >= T. G divides H, and query head h reads key head h // (H / G).
      v: [B, M, G, V] values; V may differ from K.
      causal: read keys with j <= p_i only.
      window: the number of visible keys, the query's own included: 0 <= p_i - j < window; without causal,
        |p_i - j| < window. None is no window.
      sinks: [H], a logit z per head in the denominator, neither scaled nor masked. None is z = -inf.
      segment_ids: [B, M] documents of packed rows, never decreasing along a row; tokens read their own document only.
        Negative ids mark padding: such a key is never read, such a query returns 0.
      scale: factor on the logits; None means K**-0.5.
      logits_soft_cap: c, s <- c tanh(s / c) after the scale and before the mask. None is no cap.
      implementation: where it runs, see `effattn_jax.dispatch`. "cudnn" (NVIDIA GPUs, 16-bit floats, no sinks, cap,
        documents or log-sum-exp), "mosaic_gpu" (our kernels for Hopper GPUs, 16-bit floats, up to 256 channels a head;
        interpreted on a CPU where it is named), "mosaic_tpu" (JAX's Splash kernels, without log-sum-exp; interpreted
        on a CPU, and by name only until it has run on a TPU), "xla" (memory linear in T, cost linear in the window),
        "dense" (quadratic oracle). None takes the first that supports the call of "cudnn", "mosaic_gpu" (for 64 queries
        and more on one GPU, or inside shard_map(check_vma=False)) and "xla".
      return_lse: return the logarithm of the denominator too.

    Returns:
      out [B, T, H, V] in q's dtype, accumulated in float32 (float64 for float64 inputs). With `return_lse` also
      L_i = ln(e^z + sum_j e^{s_ij}), [B, T, H] in the dtype of accumulation; differentiable as well.
      A row that may read no key has o = 0, L = z (-inf without sinks) and zero gradients.

    Raises:
      ValueError: shapes, dtypes, head counts, window, cap, scale or segment ids that do not fit.
    """
    check(q, k, v, window, sinks, scale, logits_soft_cap)
    batch, length = q.shape[:2]
    keys = k.shape[1]
    if keys < length:
        checks.fail("k", f"{keys} tokens", f"at least the {length} of q, which are the last of them")
    checks.check_segment_ids(segment_ids, batch, keys)
    query_segments = None
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        query_segments = segment_ids[:, keys - length :]
        q = real_only(q, query_segments)
        k, v = real_only(k, segment_ids), real_only(v, segment_ids)
    out, lse = attend(
        q,
        k,
        v,
        offset=keys - length,
        causal=causal,
        window=window,
        sinks=sinks,
        query_segments=query_segments,
        key_segments=segment_ids,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        implementation=implementation,
        return_lse=return_lse,
    )
    return out if lse is None or not return_lse else (out, lse)


def attend(
    q: Queries,
    k: AttentionKeys,
    v: AttentionValues,
    *,
    offset: int | Int[Array, ""],
    scale: float | None,
    implementation: Implementation,
    return_lse: bool,
    **options: Any,
) -> tuple[AttentionOut, LogSumExp | None]:
    """Checked arguments to an implementation, which may leave out a log-sum-exp that was not asked for.

    The first query is at position `offset`, the keys are at positions 0, 1, ...
    """
    batch, length, heads, key_dim = q.shape
    if q.size == 0:
        lse = jnp.full_like(q, -jnp.inf, shape=(batch, length, heads), dtype=jnp.promote_types(q.dtype, jnp.float32))
        return jnp.zeros_like(q, shape=(batch, length, heads, v.shape[-1])), lse
    scale = key_dim**-0.5 if scale is None else float(scale)
    return dispatch(
        "attention",
        IMPLEMENTATIONS,
        implementation,
        attention_here(length),
        q,
        k,
        v,
        offset=offset,
        scale=scale,
        return_lse=return_lse,
        **options,
    )


def check(
    q: Array,
    k: Array,
    v: Array,
    window: int | None,
    sinks: Array | None,
    scale: float | None,
    logits_soft_cap: float | None,
) -> None:
    """Raise ValueError on what does not fit, lengths and documents apart."""
    check_qkv(q, k, v)
    check_window(window)
    check_sinks(sinks, q.shape[2])
    check_numbers(scale, logits_soft_cap)
