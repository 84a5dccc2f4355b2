"""Vector decay on TPUs: a matrix memory that forgets by one number per channel of the keys (and head and token).

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T
    o_t = scale * S_t^T q_t                              or, with a bonus, scale * (S_{t-1} + diag(u) k_t v_t^T)^T q_t

GLA (Yang et al. 2023, arXiv:2312.06635) reads after the write, RWKV-6 (Peng et al. 2024, arXiv:2404.05892) before it.
A chunk of C = 128 tokens that starts from S, with G_i = g_1 + ... + g_i per channel, R_i = G_i where reads are after
the write and G_{i-1} where they are before it, and u = 1 without a bonus:

    O = scale (A V + (Q * e^R) S)        S' = diag(e^{G_C}) S + (K * e^{G_C - G})^T V
    A_ij = sum_d q_id k_jd e^{R_id - G_jd}  for j < i        A_ii = q_i . (u * k_i)

Pairs. Two tokens i > j differ first, from the highest bit down, in one bit h = 1, 2, 4, ..., 64: they are in the two
halves of one block of 2 h tokens, whose left half ends at m, and with

    E_h = R_i - G_m in right halves and G_m - G_j in left ones, both <= 0,

A_ij is entry ij of (Q * e^{E_h}) (K * e^{E_h})^T. So the seven levels are seven products of C x C x K, each masked to
its own pairs, and seven exponentials per token and channel; no factor is above 1, and no C x C x K tensor is made. All
exponents are sums of gates, L g with L of zeros and ones: each gate is cut into three parts of 8 bits, exact in
bfloat16, for which one pass of the MXU each is enough. Nothing is a difference of sums.

Backwards, with B = scale dO V^T and B_h what of it is of level h, dS' being the gradient of S':

    dQ_h = e^{E_h} * (B_h (K * e^{E_h}))             dK_h = e^{E_h} * (B_h^T (Q * e^{E_h}))
    dQ_S = scale e^R * (dO S^T)                      dK_S = e^{G_C - G} * (V dS'^T)
    dV   = scale A^T dO + (K * e^{G_C - G}) dS'      dS   = diag(e^{G_C}) dS' + scale (Q * e^R)^T dO

dQ and dK are the sums of theirs, and of the diagonal b_i = B_ii: b_i u k_i and b_i u q_i; du = sum_i b_i q_i k_i. The
gradient of an exponent is what has passed through it, Q * dQ_h or K * dK_h, so that of the gates is

    dg = sum_h L_h^T (Q * dQ_h + K * dK_h) + L_R^T (Q * dQ_S) + L_W^T (K * dK_S) + e^{G_C} * rowsum(S * dS')

in which every term has its own decay: nothing but rounding cancels, however strong the gates are.

Schedule. The grid is (rows, heads, blocks of up to 4 chunks); blocks are in order, forward or backward in time, and S
or dS stays in VMEM between them, as the block of the output that it ends as. In HBM q, k, v and the gates are [B, T,
H D]: a block of one head is a slice of lanes, and a projection writes that layout without a copy (seen in programs
compiled for v5e and v6e) where K and V are multiples of 128; else zeros fill them up, which is a copy. Heads that share
keys or values read the same block. What documents and padding do to the gates is done in the kernel, from a tile [8, C]
per chunk. A document begins with a gate of -120, and e^-120 = 0 parts it from the last one everywhere at once; its
first token, where it reads before the write, reads nothing but itself. The forward pass under differentiation also
writes the S that enters each block, one K x V per 512 tokens (256 where K or V is 256); the backward pass recomputes
those between the chunks of the block in VMEM.

Floors, per token and head in bfloat16, without groups, states and documents: forward 8 K + 4 V bytes, as the gates are
float32, and 14 C K + 2 C V + 4 K V flops, with the zeros of the masks, and 54 C K more that sum the gates; backward 16
K + 6 V bytes and 42 C K + 4 C V + 10 K V flops, and 114 C K more. At K = V = C: 12 K bytes and 74 K^2 flops forward, 22
K bytes and 170 K^2 flops backward, 789 and 989 flops a byte. By their data sheets chips do 240 (v5e), 166 (v5p), 560
(v6e) and 310 (tpu7x): flops bind both passes, most of them those of the sums. No time has been measured.
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
    vary_like,
)
from pallas_kernels.mosaic_tpu.gate_sums import (
    LEVELS,
    cut,
    diagonal,
    level_gates,
    pairs_of,
    read_gates,
    sums,
    to_column,
    to_row,
    write_gates,
)

__all__ = ["vector_decay"]


def vector_decay(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    bonus: jax.Array | None = None,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T, read by q_t after the write or, with a bonus, before it.

    Differentiable once, in all but the documents. H is the number of heads of the state; q, k and v may have fewer that
    divide H, each serving consecutive heads.

    Args:
      q: [B, T, H, K] queries, bfloat16 or float32; k and v are of the same dtype.
      k: [B, T, H, K] keys.
      v: [B, T, H, V] values.
      log_decay: [B, T, H, K] float32, g <= 0; below -120 it is -120.
      initial_state: [B, H, K, V] float32, the memory of the first document of each row.
      segment_ids: [B, T] int32 documents of packed rows, never decreasing along a row; memory does not cross documents.
        Negative ids mark padding: such a token writes nothing, reads zero and lets the state pass. None: one document.
      bonus: u [H, K] float32. With it o_t = scale * (S_{t-1} + diag(u) k_t v_t^T)^T q_t, else o_t = scale * S_t^T q_t.
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
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=-1)
    before = bonus is not None
    bonus = jnp.ones((heads, key_dim), jnp.float32) if bonus is None else bonus.astype(jnp.float32)
    # A row of its own for every row of the batch: their gradients are summed by the rule of the broadcast.
    bonus = vary_like(initial_state, jnp.broadcast_to(bonus[None, :, None], (batch, heads, 1, key_dim)))
    key_fill, value_fill = -key_dim % LANES, -value_dim % LANES
    out, state = _vector_decay(
        Call(before, scale, interpret),
        fill(q, 0, padding, 0, key_fill),
        fill(k, 0, padding, 0, key_fill),
        fill(v, 0, padding, 0, value_fill),
        fill(log_decay.astype(jnp.float32), 0, padding, 0, key_fill),
        fill(bonus, 0, 0, 0, key_fill),
        fill(initial_state, 0, 0, key_fill, value_fill),
        vary_like(initial_state, _token_tiles(segment_ids)),
    )
    return out[:, :length, :, :value_dim], state[:, :, :key_dim, :value_dim]


# What follows takes T in multiples of CHUNK, K and V in multiples of LANES.


class Call(NamedTuple):
    before: bool  # whether reads are before the write
    scale: float
    interpret: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vector_decay(call: Call, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    out, state = _run_forward(call, *inputs, keep_entering=False)
    return out, state


def _forward(call: Call, *inputs: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    inputs = differentiable_once(inputs)
    out, state, entering = _run_forward(call, *inputs, keep_entering=True)
    q, k, v, log_decay, bonus, _, token_tiles = inputs
    return (out, state), (q, k, v, log_decay, bonus, token_tiles, entering)


def _backward(
    call: Call, residuals: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    (q, k, v, log_decay, bonus, token_tiles, entering), (d_out, d_state) = differentiable_once((residuals, cotangents))
    plan = _plan(q, d_state, reverse=True)
    key_lanes, value_lanes, of_bonus = plan.lanes(q.shape[-1]), plan.lanes(v.shape[-1]), plan.of_head(1, q.shape[-1])
    tokens = [*map(plan.tokens, (q, k, v, log_decay))]
    dq, dk, dv, d_log_decay, d_bonus, d_initial_state = pl.pallas_call(
        functools.partial(_backward_kernel, before=call.before, scale=call.scale),
        grid=plan.grid,
        in_specs=[*tokens, of_bonus, plan.tiles(), plan.entering(), plan.tokens(d_out), plan.state()],
        out_specs=[key_lanes, key_lanes, value_lanes, key_lanes, of_bonus, plan.state()],
        out_shape=[
            *map(plan.array_of_heads, (q, k, v, log_decay)),
            plan.array(bonus.shape),
            plan.array(d_state.shape),
        ],
        scratch_shapes=[pltpu.VMEM((plan.chunks, *plan.state_shape), jnp.float32)],
        compiler_params=plan.compiler_params,
        interpret=call.interpret,
        name="vector_decay_backward",
    )(*map(lanes, (q, k, v, log_decay)), bonus, token_tiles, entering, lanes(d_out.astype(q.dtype)), d_state)
    d_log_decay = d_log_decay.reshape(log_decay.shape)
    return sum_groups(dq, q), sum_groups(dk, k), sum_groups(dv, v), d_log_decay, d_bonus, d_initial_state, None


_vector_decay.defvjp(_forward, _backward)


def _plan(q: jax.Array, state: jax.Array, *, reverse: bool) -> Plan:
    most = BLOCK if max(state.shape[2:]) <= LANES else BLOCK // 2  # as VMEM allows
    return Plan(q, state, most, reverse=reverse)


def _run_forward(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array,
    initial_state: jax.Array,
    token_tiles: jax.Array,
    *,
    keep_entering: bool,
) -> tuple[jax.Array, ...]:
    plan = _plan(q, initial_state, reverse=False)
    return run_forward(
        plan,
        functools.partial(_forward_kernel, before=call.before, scale=call.scale),
        (q, k, v, log_decay),
        [(bonus, plan.of_head(1, q.shape[-1])), (token_tiles, plan.tiles())],
        initial_state,
        keep_entering=keep_entering,
        name="vector_decay_forward",
        interpret=call.interpret,
    )


# The kernels: one block of one head of one row. What is [C, K] is float32.


def _forward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, g_ref: Any, bonus_ref: Any, tiles_ref: Any, start_ref: Any,
    out_ref: Any, state_ref: Any, *entering: Any, before: bool, scale: float,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state_ref[...] = start_ref[...]

    for entering_ref in entering:
        entering_ref[...] = state_ref[...]

    def step(chunk: Any, _: None) -> None:
        tokens = tokens_of(chunk)
        x = _Chunk.of(q_ref[tokens, :], k_ref[tokens, :], g_ref[tokens, :], tiles_ref[chunk], before)
        v, state = v_ref[tokens, :], state_ref[...]
        scores = diagonal(jnp.sum(x.q * bonus_ref[...] * x.k, 1, keepdims=True))
        for level in range(LEVELS):
            decay = x.decay(level_gates(level, before))
            of_level = dot(times(x.q_before, decay, v.dtype), times(x.k, decay, v.dtype), 1, 1)
            scores = jnp.where(pairs_of(level), of_level, scores)
        inside = dot(times(scores, scale, v.dtype), v, 1, 0)
        reading = scale * x.decay(read_gates(before))
        read = dot(times(x.q_before, reading, v.dtype), state.astype(v.dtype), 1, 0)
        out_ref[tokens, :] = (inside + read).astype(out_ref.dtype)
        state_ref[...] = _next_state(state, v, x)

    jax.lax.fori_loop(0, tiles_ref.shape[0], step, None)


def _backward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, g_ref: Any, bonus_ref: Any, tiles_ref: Any, entering_ref: Any,
    d_out_ref: Any, d_end_ref: Any, dq_ref: Any, dk_ref: Any, dv_ref: Any, dg_ref: Any, d_bonus_ref: Any,
    d_state_ref: Any, states_ref: Any, *, before: bool, scale: float,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_state_ref[...] = d_end_ref[...]
        d_bonus_ref[...] = jnp.zeros_like(d_bonus_ref)

    chunks = tiles_ref.shape[0]

    def of(chunk: Any) -> tuple[Any, _Chunk, jax.Array]:
        tokens = tokens_of(chunk)
        x = _Chunk.of(q_ref[tokens, :], k_ref[tokens, :], g_ref[tokens, :], tiles_ref[chunk], before)
        return tokens, x, v_ref[tokens, :]

    def recompute(chunk: Any, _: None) -> None:
        _, x, v = of(chunk)
        states_ref[chunk + 1] = _next_state(states_ref[chunk], v, x)

    def step(done: Any, _: None) -> None:
        chunk = chunks - 1 - done
        tokens, x, v = of(chunk)
        d_out, bonus, state, d_state = d_out_ref[tokens, :], bonus_ref[...], states_ref[chunk], d_state_ref[...]
        dtype = v.dtype

        d_scores = scale * dot(d_out, v, 1, 1)
        d_diagonal = jnp.sum(diagonal(d_scores), 1, keepdims=True)
        scores = diagonal(jnp.sum(x.q * bonus * x.k, 1, keepdims=True))
        dq_before, dk, dg = jnp.zeros_like(x.q), d_diagonal * bonus * x.q, jnp.zeros_like(x.q)
        for level in range(LEVELS):
            decay = x.decay(level_gates(level, before))
            q, k = times(x.q_before, decay, dtype), times(x.k, decay, dtype)
            scores = jnp.where(pairs_of(level), dot(q, k, 1, 1), scores)
            d_of_level = jnp.where(pairs_of(level), d_scores, 0).astype(dtype)
            dq_of_level = decay * dot(d_of_level, k, 1, 0)
            dk_of_level = decay * dot(d_of_level, q, 0, 0)
            dq_before, dk = dq_before + dq_of_level, dk + dk_of_level
            dg += sums(level_gates(level, before, 1), cut(x.q_before * dq_of_level + x.k * dk_of_level))

        rounded = d_state.astype(dtype)
        reading, writing = scale * x.decay(read_gates(before)), x.decay(write_gates())
        dq_read = reading * dot(d_out, state.astype(dtype), 1, 1)
        dk_written = writing * dot(v, rounded, 1, 1)
        dg += sums(read_gates(before, 1), cut(x.q_before * dq_read))
        dg += sums(write_gates(1), cut(x.k * dk_written))
        dg += to_row(x.keep * jnp.sum(state * d_state, 1, keepdims=True))

        dq = jnp.where(x.reads_before, dq_before + dq_read, 0) + d_diagonal * bonus * x.k
        dq_ref[tokens, :] = jnp.where(x.real, dq, 0).astype(dq_ref.dtype)
        dk_ref[tokens, :] = jnp.where(x.real, dk + dk_written, 0).astype(dk_ref.dtype)
        dv_inside = dot(times(scores, scale, dtype), d_out, 0, 0)
        dv_written = dot(times(x.k, writing, dtype), rounded, 1, 0)
        dv_ref[tokens, :] = (dv_inside + dv_written).astype(dv_ref.dtype)
        dg_ref[tokens, :] = jnp.where(x.decays, dg, 0)
        d_bonus_ref[...] += jnp.sum(d_diagonal * x.q * x.k, 0, keepdims=True)
        d_state_ref[...] = x.keep * d_state + dot(times(x.q_before, reading, dtype), d_out, 0, 0)

    states_ref[0] = entering_ref[...]
    jax.lax.fori_loop(0, chunks - 1, recompute, None)
    jax.lax.fori_loop(0, chunks, step, None)


class _Chunk(NamedTuple):
    """The tokens of a chunk as its documents have them; [C, K] each, but for `keep` [K, 1]."""

    q: jax.Array  # 0 at padding, as k
    q_before: jax.Array  # what reads writes of other tokens
    k: jax.Array
    parts: jax.Array  # [C, 3 K] of the gates
    keep: jax.Array  # e^{G_C}
    real: jax.Array
    reads_before: jax.Array
    decays: jax.Array  # where the gate is the argument's

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, gates: jax.Array, tile: jax.Array, before: bool) -> "_Chunk":
        columns = tile.T
        real, starts = (jnp.broadcast_to(columns[:, row : row + 1], gates.shape) > 0 for row in (0, 1))
        q, k = (jnp.where(real, x.astype(jnp.float32), 0) for x in (q, k))
        gates = jnp.where(real, jnp.maximum(gates, ZERO_DECAY), 0)
        gates = jnp.where(starts, ZERO_DECAY, gates)
        decays = real & ~starts
        reads_before = decays if before else real
        keep = to_column(jnp.exp(jnp.sum(gates, 0, keepdims=True)))
        return cls(q, jnp.where(reads_before, q, 0), k, cut(gates), keep, real, reads_before, decays)

    def decay(self, chosen: jax.Array) -> jax.Array:
        return jnp.exp(sums(chosen, self.parts))


def _next_state(state: jax.Array, v: jax.Array, x: _Chunk) -> jax.Array:
    return x.keep * state + dot(times(x.k, x.decay(write_gates()), v.dtype), v, 0, 0)


# Documents: a tile of eight rows per chunk, the same for all heads.


def _token_tiles(segment_ids: jax.Array) -> jax.Array:
    """[B, T / C, 8, C] float32: 1 where a token is real, 1 where it is the start of a document, six rows of nothing."""
    batch, length = segment_ids.shape
    real = segment_ids >= 0
    rows = jnp.stack([real, document_starts(segment_ids), *[jnp.zeros_like(real)] * 6], 1).astype(jnp.float32)
    return rows.reshape(batch, 8, length // CHUNK, CHUNK).swapaxes(1, 2)
