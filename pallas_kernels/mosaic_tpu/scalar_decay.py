"""Scalar decay on TPUs: a matrix memory that forgets by one number per head and token.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

Mamba-2 and its relatives (Dao & Gu 2024, arXiv:2405.21060). A chunk of C = 128 tokens that starts from S, with G_i =
g_1 + ... + g_i and D_ij = scale e^{G_i - G_j} for j <= i:

    O = ((Q K^T) * D) V + diag(scale e^G) Q S        S' = e^{G_C} S + (diag(e^{G_C - G}) K)^T V

and backwards, dS' being the gradient of S', A = Q K^T and B = dO V^T:

    dQ = (B * D) K   + diag(scale e^G) dO S^T        dV = (A * D)^T dO + diag(e^{G_C - G}) K dS'
    dK = (B * D)^T Q + diag(e^{G_C - G}) V dS'^T     dS = e^{G_C} dS' + (diag(scale e^G) Q)^T dO

A gate multiplies all that passes it, so its gradient is the sum over what is written before it and read after it, of
four kinds: pairs of the chunk, M = A * B * D below the diagonal; reads of S; writes that reach S'; and S reaching S':

    dg_t = sum_{j < t <= i} M_ij + sum_{i >= t} (scale e^{G_i} Q S dO^T)_ii
         + sum_{j < t} (e^{G_C - G_j} K dS' V^T)_jj + e^{G_C} <S, dS'>

Every term has its own decay, so nothing but rounding in float32 cancels, however strong the gates are.

Schedule. The grid is (rows, heads, blocks of up to 4 chunks); blocks are in order, forward or backward in time, and S
or dS stays in VMEM between them, as the block of the output that it ends as. In HBM q, k and v are [B, T, H K]: a block
of one head is a slice of lanes, and a projection writes that layout without a copy (seen in programs compiled for v5e
and v6e) where K and V are multiples of 128; else zeros fill them up, which is a copy. Heads that share keys or values
read the same block. All functions of the gates are made outside, a tile [8, C] per chunk: cumulative sums do not lower.
The sums are of whole multiples of 1/256, exact, and of small rests, so that G_i - G_j is exact to rounding beside gates
of any strength. A document begins with a gate of -120, and e^-120 = 0 parts it from the last one everywhere at once.
The forward pass under differentiation also writes the S that enters each block, one K x V per 512 tokens; the backward
pass recomputes those between the chunks of the block in VMEM.

Floors, per token and head in bfloat16, without groups, states and gates: forward 4 (K + V) bytes and 2 C (K + V) + 4 K
V flops, with the zeros above the diagonal; backward 8 K + 6 V bytes and C (6 K + 4 V) + 10 K V flops. At K = V = C: 8 K
bytes and 8 K^2 flops forward, K = 128 flops a byte; 14 K bytes and 20 K^2 flops backward, 183 flops a byte. By their
data sheets chips do 240 (v5e), 166 (v5p), 560 (v6e) and 310 (tpu7x): bytes bind both passes, but for the backward one
on v5p. No time has been measured.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu.blocks import (
    BLOCK,
    CHUNK,
    LANES,
    ZERO_DECAY,
    Plan,
    check_support,
    differentiable_once,
    document_starts,
    dot,
    fill,
    lanes,
    run_forward,
    sum_groups,
    times,
    tokens_of,
)

__all__ = ["scalar_decay"]

STEP = 1 / 256
NOTHING = -1e30  # an exponent that no other one brings back


def scalar_decay(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """S_t = e^{g_t} S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t, for every head (Dao & Gu 2024, arXiv:2405.21060).

    Differentiable once, in all but the documents. H is the number of heads of the state; q, k and v may have fewer that
    divide H, each serving consecutive heads.

    Args:
      q: [B, T, H, K] queries, bfloat16 or float32; k and v are of the same dtype.
      k: [B, T, H, K] keys.
      v: [B, T, H, V] values.
      log_decay: [B, T, H] float32, g <= 0; below -120 it is -120.
      initial_state: [B, H, K, V] float32, the memory of the first document of each row.
      segment_ids: [B, T] int32 documents of packed rows, never decreasing along a row; memory does not cross documents.
        Negative ids mark padding: such a token writes nothing, reads zero and lets the state pass. None: one document.
      scale: factor on the queries.
      interpret: False compiles for the TPU; `pltpu.InterpretParams()` or True runs the same on the CPU.

    Returns:
      out [B, T, H, V] in q's dtype and the final state [B, H, K, V] float32.

    Raises:
      NotImplementedError: dtypes, or sizes of heads, that the kernel does not take.
    """
    batch, length, _, key_dim = q.shape
    heads, value_dim = initial_state.shape[1], v.shape[-1]
    check_support(q, k, v, heads)
    padding = -length % CHUNK
    if padding and segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=-1)
    key_fill, value_fill = -key_dim % LANES, -value_dim % LANES
    out, state = _scalar_decay(
        Call(scale, interpret),
        fill(q, 0, padding, 0, key_fill),
        fill(k, 0, padding, 0, key_fill),
        fill(v, 0, padding, 0, value_fill),
        fill(log_decay, 0, padding),
        fill(initial_state, 0, 0, key_fill, value_fill),
        segment_ids,
    )
    return out[:, :length, :, :value_dim], state[:, :, :key_dim, :value_dim]


# What follows takes T in multiples of CHUNK, K and V in multiples of LANES.


class Call(NamedTuple):
    scale: float
    interpret: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scalar_decay(call: Call, *inputs: Any) -> tuple[jax.Array, jax.Array]:
    out, state = _run_forward(call, *inputs, keep_entering=False)
    return out, state


def _forward(call: Call, *inputs: Any) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    inputs = differentiable_once(inputs)
    out, state, entering = _run_forward(call, *inputs, keep_entering=True)
    q, k, v, log_decay, _, segment_ids = inputs
    return (out, state), (q, k, v, log_decay, segment_ids, entering)


def _backward(
    call: Call, residuals: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    (q, k, v, log_decay, segment_ids, entering), (d_out, d_state) = differentiable_once((residuals, cotangents))
    plan = _plan(q, d_state, reverse=True)
    gates = _gate_tiles(log_decay, segment_ids, call.scale)
    key_lanes, value_lanes, tiles = plan.lanes(q.shape[-1]), plan.lanes(v.shape[-1]), plan.tiles_of_heads()
    dq, dk, dv, d_gates, d_initial_state = pl.pallas_call(
        functools.partial(_backward_kernel, scale=call.scale),
        grid=plan.grid,
        in_specs=[*map(plan.tokens, (q, k, v)), tiles, plan.entering(), plan.tokens(d_out), plan.state()],
        out_specs=[key_lanes, key_lanes, value_lanes, tiles, plan.state()],
        out_shape=[*map(plan.array_of_heads, (q, k, v)), plan.array(gates.shape), plan.array(d_state.shape)],
        scratch_shapes=[pltpu.VMEM((plan.chunks, *plan.state_shape), jnp.float32)],
        compiler_params=plan.compiler_params,
        interpret=call.interpret,
        name="scalar_decay_backward",
    )(*map(lanes, (q, k, v)), gates, entering, lanes(d_out.astype(q.dtype)), d_state)
    d_log_decay = _gate_gradient(d_gates, segment_ids)
    return sum_groups(dq, q), sum_groups(dk, k), sum_groups(dv, v), d_log_decay, d_initial_state, None


_scalar_decay.defvjp(_forward, _backward)


def _plan(q: jax.Array, state: jax.Array, *, reverse: bool) -> Plan:
    most = BLOCK if max(state.shape[2:]) * q.dtype.itemsize <= 512 else BLOCK // 2  # as VMEM allows
    return Plan(q, state, most, reverse=reverse)


def _run_forward(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    *,
    keep_entering: bool,
) -> tuple[jax.Array, ...]:
    plan = _plan(q, initial_state, reverse=False)
    return run_forward(
        plan,
        functools.partial(_forward_kernel, scale=call.scale),
        (q, k, v),
        [(_gate_tiles(log_decay, segment_ids, call.scale), plan.tiles_of_heads())],
        initial_state,
        keep_entering=keep_entering,
        name="scalar_decay_forward",
        interpret=call.interpret,
    )


# The kernels: one block of one head of one row.


def _forward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, gates_ref: Any, start_ref: Any, out_ref: Any, state_ref: Any, *entering: Any,
    scale: float,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state_ref[...] = start_ref[...]

    for entering_ref in entering:
        entering_ref[...] = state_ref[...]
    for chunk in range(gates_ref.shape[0]):
        tokens = tokens_of(chunk)
        q, k, v = q_ref[tokens, :], k_ref[tokens, :], v_ref[tokens, :]
        gates, state = _Gates.of(gates_ref[chunk], scale), state_ref[...]
        inside = dot(times(dot(q, k, 1, 1), gates.decay, v.dtype), v, 1, 0)
        read = gates.read * dot(q, state.astype(q.dtype), 1, 0)
        out_ref[tokens, :] = (inside + read).astype(out_ref.dtype)
        state_ref[...] = _next_state(state, k, v, gates)


def _backward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, gates_ref: Any, entering_ref: Any, d_out_ref: Any, d_end_ref: Any,
    dq_ref: Any, dk_ref: Any, dv_ref: Any, d_gates_ref: Any, d_state_ref: Any, states_ref: Any, *,
    scale: float,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_state_ref[...] = d_end_ref[...]

    chunks = gates_ref.shape[0]
    states_ref[0] = entering_ref[...]
    for chunk in range(chunks - 1):
        tokens = tokens_of(chunk)
        gates = _Gates.of(gates_ref[chunk], scale)
        states_ref[chunk + 1] = _next_state(states_ref[chunk], k_ref[tokens, :], v_ref[tokens, :], gates)

    for chunk in reversed(range(chunks)):
        tokens = tokens_of(chunk)
        q, k, v, d_out = q_ref[tokens, :], k_ref[tokens, :], v_ref[tokens, :], d_out_ref[tokens, :]
        gates, state, d_state = _Gates.of(gates_ref[chunk], scale), states_ref[chunk], d_state_ref[...]
        scores = dot(q, k, 1, 1)
        d_scores = dot(d_out, v, 1, 1) * gates.decay
        pairs = jnp.where(_distance() > 0, scores * d_scores, 0)
        scores, d_scores = times(scores, gates.decay, q.dtype), d_scores.astype(q.dtype)
        rounded = d_state.astype(q.dtype)

        dq_read = gates.read * dot(d_out, state.astype(q.dtype), 1, 1)
        dk_written = gates.write * dot(v, rounded, 1, 1)
        dv_written = gates.write * dot(k, rounded, 1, 0)
        dq_ref[tokens, :] = (dot(d_scores, k, 1, 0) + dq_read).astype(dq_ref.dtype)
        dk_ref[tokens, :] = (dot(d_scores, q, 0, 0) + dk_written).astype(dk_ref.dtype)
        dv_ref[tokens, :] = (dot(scores, d_out, 0, 0) + dv_written).astype(dv_ref.dtype)
        d_state_ref[...] = gates.keep * d_state + dot(times(q, gates.read, q.dtype), d_out, 0, 0)

        after = jnp.sum(pairs, 1, keepdims=True) + jnp.sum(q * dq_read, 1, keepdims=True)
        before = jnp.sum(k * dk_written, 1, keepdims=True)
        through = gates.keep * jnp.sum(jnp.sum(state * d_state, 1, keepdims=True), 0, keepdims=True)
        lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, 8), 1)
        tile = jnp.where(lane == 0, after, jnp.where(lane == 1, before, through)).T
        row = jax.lax.broadcasted_iota(jnp.int32, (8, CHUNK), 0)
        d_gates_ref[chunk] = tile - jnp.where(row == 0, jnp.sum(pairs, 0, keepdims=True), 0)


def _next_state(state: jax.Array, k: jax.Array, v: jax.Array, gates: "_Gates") -> jax.Array:
    return gates.keep * state + dot(times(k, gates.write, k.dtype), v, 0, 0)


def _distance() -> jax.Array:
    """[C, C] i - j."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
    return row - column


# The gates: sums outside the kernels, a tile of eight rows per chunk in between, decays inside.


class _Gates(NamedTuple):
    decay: jax.Array  # [C, C] scale e^{G_i - G_j} for j <= i, else 0
    read: jax.Array  # [C, 1] scale e^{G_i}
    write: jax.Array  # [C, 1] e^{G_C - G_i}
    keep: jax.Array  # [1, 1] e^{G_C}

    @classmethod
    def of(cls, tile: jax.Array, scale: float) -> "_Gates":
        """From the rows that `_gate_tiles` makes; the mask comes before the exponential."""
        columns = tile.T
        exponent = (columns[:, 0:1] + tile[1:2, :]) + (columns[:, 2:3] - tile[2:3, :])
        decay = scale * jnp.exp(jnp.where(_distance() >= 0, exponent, NOTHING))
        return cls(decay, columns[:, 3:4], columns[:, 4:5], tile[5:6, 0:1])


def _gate_tiles(log_decay: jax.Array, segment_ids: jax.Array | None, scale: float) -> jax.Array:
    """[B, H, T / C, 8, C]: G_i = row 0 + row 2 = row 2 - row 1, what reads, writes and keeps, and two rows of nothing.

    Rows 0 and 1 are whole multiples of 1/256 and, at padding, exponents of nothing.
    """
    batch, length, _ = log_decay.shape
    gates = jnp.maximum(log_decay.astype(jnp.float32), ZERO_DECAY)
    real = jnp.ones((batch, length, 1), bool)
    if segment_ids is not None:
        real = (segment_ids >= 0)[..., None]
        gates = jnp.where(document_starts(segment_ids)[..., None], ZERO_DECAY, jnp.where(real, gates, 0))
    chunks = lambda x: x.swapaxes(1, 2).reshape(batch, -1, length // CHUNK, CHUNK)  # noqa: E731
    gates, real = chunks(gates), chunks(real)
    steps = jnp.round(gates / STEP)
    rest = jnp.cumsum(gates - steps * STEP, -1)
    steps = jnp.cumsum(steps, -1)
    to_end = STEP * (steps[..., -1:] - steps) + (rest[..., -1:] - rest)
    total = STEP * steps + rest
    rows = [
        jnp.where(real, STEP * steps, NOTHING),
        jnp.where(real, -STEP * steps, NOTHING),
        rest,
        jnp.where(real, scale * jnp.exp(total), 0),
        jnp.where(real, jnp.exp(to_end), 0),
        jnp.broadcast_to(jnp.exp(total[..., -1:]), total.shape),
    ]
    return jnp.stack([*rows, *[jnp.zeros_like(rest)] * 2], -2)


def _gate_gradient(tiles: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """[B, T, H] from rows of sums over what is read from t on, what is written before t, and what passes the chunk."""
    batch, heads, _, _, _ = tiles.shape
    after, before, through = tiles[..., 0, :], tiles[..., 1, :], tiles[..., 2, :]
    before = jnp.pad(before[..., :-1], [(0, 0)] * 3 + [(1, 0)])
    gradient = jax.lax.cumsum(after, 3, reverse=True) + jnp.cumsum(before, -1) + through
    gradient = gradient.reshape(batch, heads, -1).swapaxes(1, 2)
    if segment_ids is None:
        return gradient
    return jnp.where(((segment_ids >= 0) & ~document_starts(segment_ids))[..., None], gradient, 0)
