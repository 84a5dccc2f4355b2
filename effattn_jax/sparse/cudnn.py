"""Fused attention of cuDNN through `jax.nn.dot_product_attention`: NVIDIA GPUs, 16-bit floats, plain masks."""

import jax
import jax.numpy as jnp

from effattn_jax import dispatch
from effattn_jax.typing import Array, Float, Int


def cudnn(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    *,
    offset: int | Int[Array, ""],
    causal: bool,
    window: int | None,
    sinks: Float[Array, " H"] | None,
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B M"] | None,
    scale: float,
    logits_soft_cap: float | None,
    return_lse: bool,
) -> tuple[Float[Array, "B T H V"], None]:
    """Out of queries at the positions of the keys, and no log-sum-exp.

    Raises:
      NotImplementedError: what cuDNN, or its interface in `jax.nn`, does not support.
    """
    reason = (
        _refusal_of_features(causal, window, sinks, query_segments, logits_soft_cap, return_lse)
        or _refusal_of_arrays(q, k, v, offset, causal)
        or _refusal_of_device(q.shape[-1])
    )
    if reason is not None:
        raise NotImplementedError(reason)
    local = None if window is None else (window - 1, 0)  # jax counts the keys to the left, without the query's own
    out = jax.nn.dot_product_attention(
        q, k, v, scale=float(scale), is_causal=causal, local_window_size=local, implementation="cudnn"
    )
    return out, None


def _refusal_of_features(
    causal: bool, window: int | None, sinks: Array | None, segments: Array | None, cap: float | None, return_lse: bool
) -> str | None:
    if sinks is not None:
        return "sinks are not supported"
    if cap is not None:
        return "logits_soft_cap is not supported"
    if segments is not None:
        return "segment_ids are not supported"
    if return_lse:
        return "return_lse is not supported: jax.nn rounds the log-sum-exp to q's dtype and drops its gradient"
    if window is not None and not causal:
        return "a window needs causal=True"
    return None


def _refusal_of_arrays(q: Array, k: Array, v: Array, offset: int | Array, causal: bool) -> str | None:
    if {q.dtype, k.dtype, v.dtype} not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}):
        return f"q, k and v must be all bfloat16 or all float16, got {q.dtype}, {k.dtype}, {v.dtype}"
    if v.shape[-1] != k.shape[-1]:
        return f"the value dimension must equal the key dimension, got {v.shape[-1]} and {k.shape[-1]}"
    if causal and q.shape[1] != k.shape[1]:
        return f"its causal mask starts at the first key: as many queries as keys, got {q.shape[1]} and {k.shape[1]}"
    if not isinstance(offset, int) or offset != k.shape[1] - q.shape[1]:
        return "the position of the queries must be that of the last keys"
    return None


def _refusal_of_device(head_dim: int) -> str | None:
    if dispatch.platform() != "gpu":
        return f"needs an NVIDIA GPU, got {dispatch.platform()}"
    capability = str(getattr(jax.local_devices(backend="gpu")[0], "compute_capability", ""))
    generation = capability.split(".")[0]  # "9.0" is Hopper; AMD names an architecture
    if not generation.isdigit() or int(generation) < 8:
        return f"needs an NVIDIA GPU of compute capability 8.0 or later, got {capability or 'none'}"
    limit = 256 if int(generation) >= 9 else 128
    if head_dim % 8 or head_dim > limit:
        return f"the head dimension must be a multiple of 8 up to {limit}, got {head_dim}"
    return None
