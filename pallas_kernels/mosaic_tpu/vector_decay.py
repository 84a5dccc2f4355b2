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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["vector_decay"]

CHUNK = 128
LEVELS = 7  # log2 of CHUNK
BLOCK = 4  # chunks per step of the grid at most
LANES = 128
LARGEST = 256  # K and V
ZERO_DECAY = -120.0  # e^-120 is 0 in float32


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
    _check_support(q, k, v, heads)
    padding = -length % CHUNK
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=-1)
    before = bonus is not None
    bonus = jnp.ones((heads, key_dim), jnp.float32) if bonus is None else bonus.astype(jnp.float32)
    # A row of its own for every row of the batch: their gradients are summed by the rule of the broadcast.
    bonus = _vary_like(initial_state, jnp.broadcast_to(bonus[None, :, None], (batch, heads, 1, key_dim)))
    fill = lambda x, *axes: jnp.pad(x, [(0, axes[i] if i < len(axes) else 0) for i in range(x.ndim)])  # noqa: E731
    key_fill, value_fill = -key_dim % LANES, -value_dim % LANES
    out, state = _vector_decay(
        fill(q, 0, padding, 0, key_fill),
        fill(k, 0, padding, 0, key_fill),
        fill(v, 0, padding, 0, value_fill),
        fill(log_decay.astype(jnp.float32), 0, padding, 0, key_fill),
        fill(bonus, 0, 0, 0, key_fill),
        fill(initial_state, 0, 0, key_fill, value_fill),
        _vary_like(initial_state, _token_tiles(segment_ids)),
        before,
        scale,
        interpret,
    )
    return out[:, :length, :, :value_dim], state[:, :, :key_dim, :value_dim]


def _check_support(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> None:
    if q.dtype not in (jnp.bfloat16, jnp.float32) or not q.dtype == k.dtype == v.dtype:
        dtypes = ", ".join(str(x.dtype) for x in (q, k, v))
        raise NotImplementedError(f"q, k and v are {dtypes}; needs bfloat16 or float32, all alike")
    if 0 in q.shape or 0 in v.shape:
        raise NotImplementedError(f"q {q.shape} or v {v.shape} is empty")
    if max(q.shape[-1], v.shape[-1]) > LARGEST:
        raise NotImplementedError(
            f"K = {q.shape[-1]}, V = {v.shape[-1]}; needs {LARGEST} at most: VMEM holds whole states"
        )
    if any(heads % x.shape[2] for x in (q, k, v)):
        counts = [x.shape[2] for x in (q, k, v)]
        raise NotImplementedError(f"q, k and v have {counts} heads; needs counts that divide the {heads} of the state")


def _vary_like(like: jax.Array, x: jax.Array) -> jax.Array:
    """x, typed as varying over the manual mesh axes that `like` varies over."""
    axes = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


# What follows takes T in multiples of CHUNK, K and V in multiples of LANES.


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _vector_decay(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array,
    initial_state: jax.Array,
    token_tiles: jax.Array,
    before: bool,
    scale: float,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    inputs = (q, k, v, log_decay, bonus, initial_state, token_tiles)
    out, state = _forward(*inputs, before, scale, interpret, keep_entering=False)
    return out, state


def _vector_decay_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array,
    initial_state: jax.Array,
    token_tiles: jax.Array,
    before: bool,
    scale: float,
    interpret: Any,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    inputs = (q, k, v, log_decay, bonus, initial_state, token_tiles)
    out, state, entering = _forward(*inputs, before, scale, interpret, keep_entering=True)
    return (out, state), (q, k, v, log_decay, bonus, token_tiles, entering)


def _vector_decay_backward(
    before: bool,
    scale: float,
    interpret: Any,
    residuals: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    q, k, v, log_decay, bonus, token_tiles, entering = residuals
    d_out, d_state = cotangents
    heads, key_dim, value_dim = d_state.shape[1:]
    plan = _Plan(q, d_state, reverse=True)
    tokens = [*map(plan.tokens, (q, k, v, log_decay))]
    dq, dk, dv, d_log_decay, d_bonus, d_initial_state = pl.pallas_call(
        functools.partial(_backward_kernel, before=before, scale=scale),
        grid=plan.grid,
        in_specs=[*tokens, plan.bonus(), plan.tiles(), plan.entering(), plan.tokens(d_out), plan.state()],
        out_specs=[
            plan.lanes(key_dim),
            plan.lanes(key_dim),
            plan.lanes(value_dim),
            plan.lanes(key_dim),
            plan.bonus(),
            plan.state(),
        ],
        out_shape=[
            plan.array((*q.shape[:2], heads * key_dim), q.dtype),
            plan.array((*k.shape[:2], heads * key_dim), k.dtype),
            plan.array((*v.shape[:2], heads * value_dim), v.dtype),
            plan.array((*q.shape[:2], heads * key_dim), jnp.float32),
            plan.array(bonus.shape, jnp.float32),
            plan.array(d_state.shape, jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((plan.chunks, key_dim, value_dim), jnp.float32)],
        compiler_params=plan.compiler_params,
        interpret=interpret,
        name="vector_decay_backward",
    )(
        *map(_lanes, (q, k, v, log_decay)),
        bonus,
        token_tiles,
        entering,
        _lanes(d_out.astype(q.dtype)),
        d_state,
    )
    groups = lambda d, x: _sum_groups(d.reshape(*x.shape[:2], heads, x.shape[-1]), x)  # noqa: E731
    d_log_decay = d_log_decay.reshape(log_decay.shape)
    return groups(dq, q), groups(dk, k), groups(dv, v), d_log_decay, d_bonus, d_initial_state, None


_vector_decay.defvjp(_vector_decay_forward, _vector_decay_backward)


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array,
    initial_state: jax.Array,
    token_tiles: jax.Array,
    before: bool,
    scale: float,
    interpret: Any,
    *,
    keep_entering: bool,
) -> tuple[jax.Array, ...]:
    """out, the final state, and with `keep_entering` the state that enters each block [B, H, T / block, K, V]."""
    batch, length, _, _ = q.shape
    heads, key_dim, value_dim = initial_state.shape[1:]
    plan = _Plan(q, initial_state, reverse=False)
    out_specs = [plan.lanes(value_dim), plan.state()]
    out_shape = [
        plan.array((batch, length, heads * value_dim), q.dtype),
        plan.array(initial_state.shape, jnp.float32),
    ]
    if keep_entering:
        out_specs.append(plan.entering())
        out_shape.append(plan.array((batch, heads, plan.grid[2], key_dim, value_dim), jnp.float32))
    out, *states = pl.pallas_call(
        functools.partial(_forward_kernel, before=before, scale=scale),
        grid=plan.grid,
        in_specs=[*map(plan.tokens, (q, k, v, log_decay)), plan.bonus(), plan.tiles(), plan.state()],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plan.compiler_params,
        interpret=interpret,
        name="vector_decay_forward",
    )(*map(_lanes, (q, k, v, log_decay)), bonus, token_tiles, initial_state)
    return out.reshape(batch, length, heads, value_dim), *states


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
        tokens = _tokens_of(chunk)
        x = _Chunk.of(q_ref[tokens, :], k_ref[tokens, :], g_ref[tokens, :], tiles_ref[chunk], before)
        v, state = v_ref[tokens, :], state_ref[...]
        scores = _diagonal(jnp.sum(x.q * bonus_ref[...] * x.k, 1, keepdims=True))
        for level in range(LEVELS):
            decay = x.decay(_level(level, before))
            of_level = _dot(_times(x.q_before, decay, v.dtype), _times(x.k, decay, v.dtype), 1, 1)
            scores = jnp.where(_pairs(level), of_level, scores)
        inside = _dot(_times(scores, scale, v.dtype), v, 1, 0)
        reading = scale * x.decay(_reads(before))
        read = _dot(_times(x.q_before, reading, v.dtype), state.astype(v.dtype), 1, 0)
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
        tokens = _tokens_of(chunk)
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

        d_scores = scale * _dot(d_out, v, 1, 1)
        d_diagonal = jnp.sum(_diagonal(d_scores), 1, keepdims=True)
        scores = _diagonal(jnp.sum(x.q * bonus * x.k, 1, keepdims=True))
        dq_before, dk, dg = jnp.zeros_like(x.q), d_diagonal * bonus * x.q, jnp.zeros_like(x.q)
        for level in range(LEVELS):
            decay = x.decay(_level(level, before))
            q, k = _times(x.q_before, decay, dtype), _times(x.k, decay, dtype)
            scores = jnp.where(_pairs(level), _dot(q, k, 1, 1), scores)
            d_of_level = jnp.where(_pairs(level), d_scores, 0).astype(dtype)
            dq_of_level = decay * _dot(d_of_level, k, 1, 0)
            dk_of_level = decay * _dot(d_of_level, q, 0, 0)
            dq_before, dk = dq_before + dq_of_level, dk + dk_of_level
            dg += _sums(_level(level, before, 1), _parts(x.q_before * dq_of_level + x.k * dk_of_level))

        rounded = d_state.astype(dtype)
        reading, writing = scale * x.decay(_reads(before)), x.decay(_writes())
        dq_read = reading * _dot(d_out, state.astype(dtype), 1, 1)
        dk_written = writing * _dot(v, rounded, 1, 1)
        dg += _sums(_reads(before, 1), _parts(x.q_before * dq_read))
        dg += _sums(_writes(1), _parts(x.k * dk_written))
        dg += _row(x.keep * jnp.sum(state * d_state, 1, keepdims=True))

        dq = jnp.where(x.reads_before, dq_before + dq_read, 0) + d_diagonal * bonus * x.k
        dq_ref[tokens, :] = jnp.where(x.real, dq, 0).astype(dq_ref.dtype)
        dk_ref[tokens, :] = jnp.where(x.real, dk + dk_written, 0).astype(dk_ref.dtype)
        dv_inside = _dot(_times(scores, scale, dtype), d_out, 0, 0)
        dv_written = _dot(_times(x.k, writing, dtype), rounded, 1, 0)
        dv_ref[tokens, :] = (dv_inside + dv_written).astype(dv_ref.dtype)
        dg_ref[tokens, :] = jnp.where(x.decays, dg, 0)
        d_bonus_ref[...] += jnp.sum(d_diagonal * x.q * x.k, 0, keepdims=True)
        d_state_ref[...] = x.keep * d_state + _dot(_times(x.q_before, reading, dtype), d_out, 0, 0)

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
        keep = _column(jnp.exp(jnp.sum(gates, 0, keepdims=True)))
        return cls(q, jnp.where(reads_before, q, 0), k, _parts(gates), keep, real, reads_before, decays)

    def decay(self, chosen: jax.Array) -> jax.Array:
        return jnp.exp(_sums(chosen, self.parts))


def _next_state(state: jax.Array, v: jax.Array, x: _Chunk) -> jax.Array:
    return x.keep * state + _dot(_times(x.k, x.decay(_writes()), v.dtype), v, 0, 0)


def _tokens_of(chunk: Any) -> Any:
    return pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)


# Matrices [C, C] of truths: which gates t (along `axis` 0 of those of the gradient, else 1) are in the exponent of i.


def _indices(axis: int = 0) -> tuple[jax.Array, jax.Array]:
    """i along an axis, and what it is paired with along the other one."""
    i, t = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), a) for a in (axis, 1 - axis))
    return i, t


def _pairs(level: int) -> jax.Array:
    """i > j that differ first in this bit."""
    i, j = _indices()
    return ((i ^ j) >> level == 1) & (i > j)


def _level(level: int, before: bool, axis: int = 0) -> jax.Array:
    """E_h: in right halves what comes between the middle and the read, in left ones between the write and the middle.

    Both are gates of the half itself.
    """
    i, t = _indices(axis)
    right = (i >> level) & 1 == 1
    return (i >> level == t >> level) & ((right & _reads(before, axis)) | (~right & (t > i)))


def _reads(before: bool, axis: int = 0) -> jax.Array:
    """R_i."""
    i, t = _indices(axis)
    return t < i if before else t <= i


def _writes(axis: int = 0) -> jax.Array:
    """G_C - G_i."""
    i, t = _indices(axis)
    return t > i


def _sums(chosen: jax.Array, parts: jax.Array) -> jax.Array:
    """[C, K] the sums of chosen tokens, [C, C], from the parts of x [C, K]."""
    sums = _dot(chosen.astype(jnp.float32).astype(jnp.bfloat16), parts, 1, 0)
    dim = parts.shape[1] // 3
    return sums[:, :dim] + (sums[:, dim : 2 * dim] + sums[:, 2 * dim :])


def _parts(x: jax.Array) -> jax.Array:
    """[C, 3 K] bfloat16: three parts whose sum is x, 8 bits of its 24 each."""
    parts = []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & ~0xFFFF
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return jnp.concatenate(parts, 1)


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """The product over an axis of each, accumulated in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def _times(x: jax.Array, factor: jax.Array | float, dtype: Any) -> jax.Array:
    """The product in float32, rounded once."""
    return (x * factor).astype(dtype)


def _diagonal(x: jax.Array) -> jax.Array:
    """[C, C] x on the diagonal, else 0."""
    i, j = _indices()
    return jnp.where(i == j, x, 0)


def _column(row: jax.Array) -> jax.Array:
    """[1, K] -> [K, 1], by way of tiles of eight rows."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _row(column: jax.Array) -> jax.Array:
    """[K, 1] -> [1, K]."""
    return jnp.broadcast_to(column, (column.shape[0], 8)).T[:1]


# Documents: a tile of eight rows per chunk, the same for all heads.


def _token_tiles(segment_ids: jax.Array) -> jax.Array:
    """[B, T / C, 8, C] float32: 1 where a token is real, 1 where it is the start of a document, six rows of nothing.

    Starts are those of every document but the first of a row: to that one belongs the state before the row.
    """
    batch, length = segment_ids.shape
    real = segment_ids >= 0
    before = jax.lax.cummax(jnp.maximum(segment_ids, -1), axis=1)[:, :-1]
    before = jnp.pad(before, ((0, 0), (1, 0)), constant_values=-1)
    starts = real & (before >= 0) & (segment_ids != before)
    rows = jnp.stack([real, starts, *[jnp.zeros_like(real)] * 6], 1).astype(jnp.float32)
    return rows.reshape(batch, 8, length // CHUNK, CHUNK).swapaxes(1, 2)


# The layout in HBM, and which block of it a step of the grid has.


class _Plan:
    """Blocks of T / block steps, in the order of time or `reverse`."""

    def __init__(self, tokens: jax.Array, state: jax.Array, reverse: bool) -> None:
        batch, length = tokens.shape[:2]
        chunks = length // CHUNK
        largest = BLOCK if max(state.shape[2:]) <= LANES else BLOCK // 2  # as VMEM allows
        self.chunks = next(n for n in range(largest, 0, -1) if chunks % n == 0)
        self.grid = (batch, state.shape[1], chunks // self.chunks)
        self.state_shape = state.shape[2:]
        self.like = state
        self.compiler_params = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
        self._time: Callable[[Any], Any] = (lambda n: self.grid[2] - 1 - n) if reverse else (lambda n: n)

    def array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An output that varies over the manual mesh axes that the inputs vary over."""
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(self.like).manual_axis_type)

    def tokens(self, x: jax.Array) -> pl.BlockSpec:
        """A block of the head of x [B, T, heads, D] that serves the head of the step."""
        return self.lanes(x.shape[-1], self.grid[1] // x.shape[2])

    def lanes(self, dim: int, group: int = 1) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.chunks * CHUNK, dim), lambda b, h, n: (b, self._time(n), h // group))

    def tiles(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.chunks, 8, CHUNK), lambda b, h, n: (b, self._time(n), 0, 0))

    def bonus(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, 1, self.state_shape[0]), lambda b, h, n: (b, h, 0, 0))

    def state(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *self.state_shape), lambda b, h, n: (b, h, 0, 0))

    def entering(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, *self.state_shape), lambda b, h, n: (b, h, self._time(n), 0, 0))


def _lanes(x: jax.Array) -> jax.Array:
    """[B, T, H, D] -> [B, T, H D]."""
    return x.reshape(*x.shape[:2], -1)


def _sum_groups(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """[B, T, H, D] -> the shape of x: a head of x serves H / heads consecutive ones."""
    groups = gradient.reshape(*x.shape[:3], -1, x.shape[-1])
    return jnp.sum(groups, 3, dtype=jnp.float32).astype(x.dtype)
