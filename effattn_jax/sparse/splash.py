"""Softmax attention on TPUs by the Splash kernels of `jax.experimental.pallas.ops.tpu`, which skip masked blocks."""

from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax.dispatch import platform
from effattn_jax.typing import Array, Float, Int

LANES = 128  # tokens and channels come in such blocks
BLOCKS = (512, 256, 128)  # tokens of a block of queries or keys, the largest that divides


def splash(
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
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T H V"], None]:
    """Out of queries at the positions of the keys, and no log-sum-exp. `interpret` None: on a CPU.

    Raises:
      NotImplementedError: what Splash, or its interface, does not support.
    """
    reason = _refusal(q, offset, causal, return_lse)
    if reason is not None:
        raise NotImplementedError(reason)
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    (length, heads), keys, value_dim = q.shape[1:3], k.shape[1], v.shape[-1]
    query_tail, key_tail = -length % LANES, -keys % LANES
    if query_tail > key_tail:  # a query that fills up reads a key that fills up
        key_tail += LANES
    if query_segments is None and (query_tail or key_tail):
        query_segments, key_segments = (jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k))
    segments = None
    if query_segments is not None and key_segments is not None:
        ids = lambda x, tail: jnp.pad(jnp.maximum(x, -1), ((0, 0), (0, tail)), constant_values=-1)  # noqa: E731
        segments = kernel.SegmentIds(ids(query_segments, query_tail), ids(key_segments, key_tail))
    rows = lambda x, tail: jnp.moveaxis(  # noqa: E731
        jnp.pad(x, ((0, 0), (0, tail), (0, 0), (0, -x.shape[-1] % LANES))), 2, 1
    )
    q = rows((q * scale).astype(q.dtype), query_tail)
    k, v = rows(k, key_tail), rows(v, key_tail)
    mask = _mask(heads, q.shape[2], k.shape[2], int(offset), causal, window)
    block_q, block_kv = (next(size for size in BLOCKS if x.shape[2] % size == 0) for x in (q, k))
    run: Any = kernel.make_splash_mha(
        mask,
        block_sizes=kernel.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=logits_soft_cap,
        interpret=platform() == "cpu" if interpret is None else interpret,
    )
    out = jax.vmap(lambda q, k, v, segments: run(q, k, v, segments, sinks))(q, k, v, segments)
    return jnp.moveaxis(out, 1, 2)[:, :length, :, :value_dim], None


def _mask(heads: int, length: int, keys: int, offset: int, causal: bool, window: int | None) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, keys)
    if window is not None:
        one: Any = masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), offset)
    else:
        one = masks.CausalMask(shape, offset) if causal else masks.FullMask(shape)
    return masks.MultiHeadMask([one] * heads)


def _refusal(q: Array, offset: int | Array, causal: bool, return_lse: bool) -> str | None:
    if platform() == "gpu":
        return "a kernel for TPUs; this is a gpu"
    if return_lse:
        return "return_lse is not supported: Splash has no gradient of the log-sum-exp"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q is {q.dtype}; needs bfloat16 or float32"
    if isinstance(offset, jax.Array):
        return "the number of keys before the queries is not known at trace time"
    if q.shape[1] == 1:
        return "one query is a product with the keys; needs at least two"
    return None
