"""Scalar decay by plain Triton kernels, forward and backward, for GPUs that have no kernel of their own.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

In a chunk of C tokens that state S enters and the gradient dS' of the next chunk's state enters backwards, with
G_i = g_1 + ... + g_i and D_ij = e^{G_i - G_j} for j <= i:

    O  = scale (((Q K^T) * D) V + diag(e^G) Q S)                 S' = e^{G_C} S + (diag(e^{G_C - G}) K)^T V
    dQ = A K + scale diag(e^G) dO S^T                            A  = scale (dO V^T) * D
    dK = A^T Q + diag(e^{G_C - G}) V dS'^T
    dV = scale ((Q K^T) * D)^T dO + diag(e^{G_C - G}) K dS'      dS = e^{G_C} dS' + scale (diag(e^G) Q)^T dO
    dg_t = sum_{i >= t > j} A_ij (q_i . k_j) + sum_{i >= t} q_i . (dq_i from S) + sum_{j < t} k_j . (dk_j from dS')
         + e^{G_C} <S, dS'>

One kernel walks the states over the chunks and leaves each in memory, in the inputs' dtype; another makes all outputs
at once. Backwards the states are walked again, then their gradients, and two kernels make dq with dk, and dv. Nothing
but the inputs is kept for the backward pass.

Floors at B4 T8192 H16 K = V = 128 in bfloat16: q, k, v and o once are 0.54 GB, the states written and read are as much
again; 1.1 GB are 0.53 ms at the 2.0 TB/s of an A100, 0.25 ms at the 4.25 TB/s of an H200. The backward pass moves
3.8 GB, 1.9 ms and 0.89 ms. Measured there on an H100 (jax 0.11.2, jax-triton 0.3.1, triton 3.6): 0.565 ms forward,
1.845 with the backward pass.

On Turing (a T4) Triton 3.6 makes products without tensor cores, spilling registers: right, but slow.

Dao and Gu 2024, arXiv:2405.21060 (the chunked form).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.triton import kernels
from pallas_kernels.triton.gates import CHUNK, STEP, Gates, gate_gradient, gates
from pallas_kernels.triton.launch import launch, over_rows, precision
from pallas_kernels.triton.sizes import LARGEST, size

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def scalar_decay(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """The equation above for every head: out [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32.

    Differentiable once, in all arrays of floats.

    Args:
      q, k: [B, T, heads, K], v: [B, T, heads, V], all in bfloat16, float16 or float32; heads divide H, each serves
        consecutive ones.
      log_decay: [B, T, H], float32, <= 0.
      initial_state: [B, H, K, V], float32: the memory of the first document of each row.
      segment_ids: [B, T], documents of packed rows, never decreasing along a row but for negative ids, which mark
        padding: such a token writes nothing, reads zero and lets the state pass.
      scale: a number.

    Raises:
      NotImplementedError: other dtypes, K or V above 256, no tokens, a scale that is not a number.
    """
    if v.dtype not in DTYPES or q.dtype != v.dtype or k.dtype != v.dtype:
        raise NotImplementedError(
            f"q, k, v of {q.dtype}, {k.dtype}, {v.dtype}; needs one of bfloat16, float16, float32"
        )
    if max(q.shape[-1], v.shape[-1]) > LARGEST:
        raise NotImplementedError(f"K = {q.shape[-1]}, V = {v.shape[-1]}; needs at most {LARGEST}")
    if not q.shape[1]:
        raise NotImplementedError("no tokens; needs at least one")
    if not isinstance(scale, (int, float)):
        raise NotImplementedError(f"scale {scale}; needs a number")
    return _scalar_decay(Call(float(scale), precision(v.dtype)), q, k, v, log_decay, initial_state, segment_ids)


class Call(NamedTuple):
    scale: float
    precision: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scalar_decay(call: Call, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    return over_rows(functools.partial(_outputs, call))(*arrays)


def _forward(call: Call, *arrays: Any) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    return _scalar_decay(call, *arrays), arrays


def _backward(call: Call, kept: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    return (*over_rows(functools.partial(_gradients, call))(*kept, *cotangents), None)


_scalar_decay.defvjp(_forward, _backward)


def _outputs(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    batch, length, heads = log_decay.shape
    sums = gates(log_decay, segment_ids)
    states, last = _walk(call, k, v, sums.write, sums.keep, initial_state)
    sizes = size("outputs", q.dtype, q.shape[-1], v.shape[-1])
    [out] = launch(
        kernels.outputs,
        batch * _chunks(sums) * heads * -(-v.shape[-1] // sizes.block_v),
        [jax.ShapeDtypeStruct((batch, length, heads, v.shape[-1]), v.dtype)],
        [q, k, v, states, sums.steps, sums.fine, sums.read, sums.documents],
        sizes,
        **_constants(call, q, k, v, sums, length, sizes),
        V_HEADS=v.shape[2],
    )
    return out, last


def _gradients(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    d_out: jax.Array,
    d_state: jax.Array,
) -> tuple[jax.Array, ...]:
    batch, length, heads = log_decay.shape
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    sums = gates(log_decay, segment_ids)
    states, _ = _walk(call, k, v, sums.write, sums.keep, initial_state)
    d_states, d_initial = _walk(call, q, d_out, sums.read * call.scale, sums.keep, d_state, reverse=True)
    programs = batch * _chunks(sums) * heads
    like = jax.ShapeDtypeStruct

    sizes = size("gradients_of_queries_and_keys", q.dtype, key_dim, value_dim)
    blocks = -(-key_dim // sizes.block_k)
    dq, dk, after, before, overlap = launch(
        kernels.gradients_of_queries_and_keys,
        programs * blocks,
        [
            *[like((batch, length, heads, key_dim), q.dtype)] * 2,
            *[like((blocks, *sums.steps.shape), jnp.float32)] * 2,
            like((blocks, *sums.keep.shape), jnp.float32),
        ],
        [q, k, v, d_out, states, d_states, sums.steps, sums.fine, sums.read, sums.write, sums.documents],
        sizes,
        **_constants(call, q, k, v, sums, length, sizes),
        V_HEADS=v.shape[2],
        ROWS=batch,
    )
    sizes = size("gradients_of_values", q.dtype, key_dim, value_dim)
    [dv] = launch(
        kernels.gradients_of_values,
        programs * -(-value_dim // sizes.block_v),
        [like((batch, length, heads, value_dim), v.dtype)],
        [q, k, d_out, d_states, sums.steps, sums.fine, sums.write, sums.documents],
        sizes,
        **_constants(call, q, k, v, sums, length, sizes),
    )
    dg = gate_gradient(after.sum(0), before.sum(0), overlap.sum(0), sums.keep, segment_ids, length)
    grouped = lambda dx, x: dx.reshape(*x.shape[:3], -1, x.shape[3]).sum(3) if dx.shape != x.shape else dx  # noqa: E731
    return grouped(dq, q), grouped(dk, k), grouped(dv, v), dg, d_initial


def _walk(
    call: Call,
    x: jax.Array,
    y: jax.Array,
    factor: jax.Array,
    keep: jax.Array,
    start: jax.Array,
    *,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """States [B, H, N, K, V] before each chunk, in the walk's direction and y's dtype, and the last [B, H, K, V]."""
    batch, heads, key_dim, value_dim = start.shape
    sizes = size("walk_states", x.dtype, key_dim, value_dim)
    states, last = launch(
        kernels.walk_states,
        batch * heads * -(-key_dim // sizes.block_k) * -(-value_dim // sizes.block_v),
        [
            jax.ShapeDtypeStruct((*keep.shape, key_dim, value_dim), y.dtype),
            jax.ShapeDtypeStruct(start.shape, jnp.float32),
        ],
        [x, y, factor, keep, start],
        sizes,
        LENGTH=x.shape[1],
        HEADS=heads,
        X_HEADS=x.shape[2],
        Y_HEADS=y.shape[2],
        K=key_dim,
        V=value_dim,
        CHUNKS=keep.shape[2],
        CHUNK=CHUNK,
        BLOCK_K=sizes.block_k,
        BLOCK_V=sizes.block_v,
        REVERSE=reverse,
        PRECISION=call.precision,
    )
    return states, last


def _chunks(sums: Gates) -> int:
    return sums.keep.shape[2]


def _constants(
    call: Call, q: jax.Array, k: jax.Array, v: jax.Array, sums: Gates, length: int, sizes: Any
) -> dict[str, Any]:
    """Of the kernels that take all chunks at once."""
    return {
        "LENGTH": length,
        "HEADS": sums.keep.shape[1],
        "Q_HEADS": q.shape[2],
        "K_HEADS": k.shape[2],
        "K": q.shape[-1],
        "V": v.shape[-1],
        "CHUNKS": _chunks(sums),
        "CHUNK": CHUNK,
        "STEP": STEP,
        "BLOCK_K": sizes.block_k,
        "BLOCK_V": sizes.block_v,
        "SCALE": call.scale,
        "PRECISION": call.precision,
    }
