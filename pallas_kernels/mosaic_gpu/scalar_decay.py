"""Scalar decay on Hopper GPUs, forward and backward.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

For K and V up to 128 one kernel does all of it, four times (`scalar_scans`); larger ones take the passes of
`scalar_chunks`.

Nothing but the inputs is kept for the backward pass.

The start of a document has the gate -120: e^{-120} is 0 in float32, so all that would cross it vanishes. Gates that are
stronger are taken for -120 too. When nothing asks for the gradient of the gates, it costs nothing.

Floors of the forward pass at B4 T8192 H16 K = V = 128: q, k, v and o once are 0.54 GB, 0.13 ms at the 4.25 TB/s of an
H200; the products are 60 GFLOP with the scores made twice, 0.08 ms at 790 TFLOP/s. q and k are read by two blocks of
threads each, which run at the same time: the second read is one of the cache. The backward pass moves 2.4 GB, 0.57 ms,
and makes three times the products. Measured on an H200: 0.221 ms forward, 0.986 with the backward pass; the passes of
`scalar_chunks` take 0.364 and 1.213 there.

Dao and Gu 2024, arXiv:2405.21060 (the chunked form).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.mosaic_gpu import scalar_chunks, scalar_scans
from pallas_kernels.mosaic_gpu.rows import fold_rows
from pallas_kernels.mosaic_gpu.scan import CHUNK

DIMS = (64, 128, 256)  # of q, k and v; others are filled up with zeros
SCANS = 128  # the largest that `scalar_scans` takes; beyond, `scalar_chunks`


def scalar_decay(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    *,
    scale: float,
    parts: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The equation above for every head: out [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32.

    Differentiable once, in all arrays of floats.

    Args:
      q, k: [B, T, heads, K], v: [B, T, heads, V] in bfloat16 or float16; heads divide H, each serves consecutive ones.
      log_decay: [B, T, H], float32, <= 0.
      initial_state: [B, H, K, V], float32: the memory of the first document of each row.
      segment_ids: [B, T], documents of packed rows, never decreasing along a row but for negative ids, which mark
        padding: such a token writes nothing, reads zero and lets the state pass.
      scale: > 0.
      parts: how many each row is cut into; None: as many as fill the chip.
      interpret: parameters of the interpreter that runs the kernel on a CPU.

    Raises:
      NotImplementedError: other dtypes, K or V above 256, a scale that is not a positive number.
    """
    if v.dtype not in (jnp.bfloat16, jnp.float16) or q.dtype != v.dtype or k.dtype != v.dtype:
        raise NotImplementedError(f"q, k, v of {q.dtype}, {k.dtype}, {v.dtype}; needs one of bfloat16, float16")
    key_dim, value_dim, length = q.shape[-1], v.shape[-1], q.shape[1]
    if max(key_dim, value_dim) > DIMS[-1]:
        raise NotImplementedError(f"K = {key_dim}, V = {value_dim}; needs at most {DIMS[-1]}")
    if not isinstance(scale, (int, float)) or not scale > 0:
        raise NotImplementedError(f"scale {scale}; needs a positive number")
    keys, values = (next(size for size in DIMS if size >= dim) for dim in (key_dim, value_dim))
    tail = -length % CHUNK
    if segment_ids is not None:
        real = (segment_ids >= 0)[..., None, None]
        q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))  # 0 times NaN would be NaN
        segment_ids = _fill(segment_ids, (0, tail), -1)
    q, k, v = (_fill(x, (0, tail, 0, dim - x.shape[-1])) for x, dim in ((q, keys), (k, keys), (v, values)))
    log_decay = _fill(log_decay, (0, tail, 0))
    initial_state = _fill(initial_state, (0, 0, keys - key_dim, values - value_dim))
    call = Call(float(scale), parts, interpret)
    out, state = _scalar_decay(call, q, k, v, log_decay, initial_state, segment_ids)
    return out[:, :length, :, :value_dim], state[:, :, :key_dim, :value_dim]


class Call(NamedTuple):
    scale: float
    parts: int | None
    interpret: Any

    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "parts": self.parts, "interpret": self.interpret}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scalar_decay(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    run = functools.partial(_passes(q, v).forward, **call.options())
    return fold_rows(run, (0,) * 6)(q, k, v, log_decay, initial_state, segment_ids)


def _forward(call: Call, *primals: Any) -> tuple[Any, Any]:
    arrays = [None if x is None else x.value for x in primals]
    gates = jnp.zeros(()) if primals[3].perturbed else None  # there or not: whether their gradient is asked for
    return _scalar_decay(call, *arrays), (arrays, gates)


def _backward(call: Call, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    arrays, gates = kept
    cotangents = [jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in cotangents]
    run = functools.partial(_passes(arrays[0], arrays[2]).backward, gates=gates is not None, **call.options())
    dq, dk, dv, d_log_decay, d_initial = fold_rows(run, (0,) * 8)(*arrays, *cotangents)
    grouped = lambda dx, x: dx.reshape(*x.shape[:3], -1, x.shape[3]).sum(3) if dx.shape != x.shape else dx  # noqa: E731
    q, k, v = arrays[:3]
    return grouped(dq, q), grouped(dk, k), grouped(dv, v), d_log_decay, d_initial, None


_scalar_decay.defvjp(_forward, _backward, symbolic_zeros=True)


def _passes(q: jax.Array, v: jax.Array) -> Any:
    return scalar_scans if max(q.shape[-1], v.shape[-1]) <= SCANS else scalar_chunks


def _fill(x: jax.Array, tails: tuple[int, ...], value: float = 0) -> jax.Array:
    if not any(tails):
        return x
    return jnp.pad(x, [(0, tail) for tail in tails], constant_values=value)
