"""Softmax attention on Hopper GPUs by the Mosaic GPU kernels of `pallas_kernels`, forward and backward."""

from typing import Any

from effattn_jax.kernels import hopper_or_interpreter, refuse_varying
from effattn_jax.typing import Array, Float, Int


def mosaic_gpu(
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
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Out and log-sum-exp of queries at positions offset, offset + 1, ... over keys at positions 0, 1, ...

    Raises:
      NotImplementedError: not a Hopper GPU, and what `pallas_kernels.mosaic_gpu.attention` refuses.
    """
    refuse_varying(q, k, v, sinks, query_segments, key_segments)
    if not isinstance(offset, int):
        raise NotImplementedError("the number of keys before the queries is not known at trace time")
    interpret: Any = hopper_or_interpreter()
    from pallas_kernels.mosaic_gpu.attention import attention

    return attention(
        q,
        k,
        v,
        sinks,
        query_segments,
        key_segments,
        offset=offset,
        causal=causal,
        window=None if window is None else int(window),
        scale=scale,
        cap=logits_soft_cap,
        interpret=interpret,
    )
