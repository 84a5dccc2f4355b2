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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["scalar_decay"]

CHUNK = 128
BLOCK = 4  # chunks per step of the grid at most
LANES = 128
LARGEST = 256  # K and V
ZERO_DECAY = -120.0  # e^-120 is 0 in float32
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
    _check_support(q, k, v, heads)
    padding = -length % CHUNK
    if padding and segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=-1)
    fill = lambda x, *axes: jnp.pad(x, [(0, axes[i] if i < len(axes) else 0) for i in range(x.ndim)])  # noqa: E731
    key_fill, value_fill = -key_dim % LANES, -value_dim % LANES
    out, state = _scalar_decay(
        fill(q, 0, padding, 0, key_fill),
        fill(k, 0, padding, 0, key_fill),
        fill(v, 0, padding, 0, value_fill),
        fill(log_decay, 0, padding),
        fill(initial_state, 0, 0, key_fill, value_fill),
        segment_ids,
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


# What follows takes T in multiples of CHUNK, K and V in multiples of LANES.


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _scalar_decay(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    out, state = _forward(q, k, v, log_decay, initial_state, segment_ids, scale, interpret, keep_entering=False)
    return out, state


def _scalar_decay_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    interpret: Any,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    out, state, entering = _forward(
        q, k, v, log_decay, initial_state, segment_ids, scale, interpret, keep_entering=True
    )
    return (out, state), (q, k, v, log_decay, segment_ids, entering)


def _scalar_decay_backward(
    scale: float, interpret: Any, residuals: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    q, k, v, log_decay, segment_ids, entering = residuals
    d_out, d_state = cotangents
    heads, key_dim, value_dim = d_state.shape[1:]
    plan = _Plan(q, d_state, reverse=True)
    gates = _gate_tiles(log_decay, segment_ids, scale)
    dq, dk, dv, d_gates, d_initial_state = pl.pallas_call(
        functools.partial(_backward_kernel, scale=scale),
        grid=plan.grid,
        in_specs=[*map(plan.tokens, (q, k, v)), plan.tiles(), plan.entering(), plan.tokens(d_out), plan.state()],
        out_specs=[plan.lanes(key_dim), plan.lanes(key_dim), plan.lanes(value_dim), plan.tiles(), plan.state()],
        out_shape=[
            plan.array((*q.shape[:2], heads * key_dim), q.dtype),
            plan.array((*k.shape[:2], heads * key_dim), k.dtype),
            plan.array((*v.shape[:2], heads * value_dim), v.dtype),
            plan.array(gates.shape, jnp.float32),
            plan.array(d_state.shape, jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((plan.chunks, key_dim, value_dim), jnp.float32)],
        compiler_params=plan.compiler_params,
        interpret=interpret,
        name="scalar_decay_backward",
    )(_lanes(q), _lanes(k), _lanes(v), gates, entering, _lanes(d_out.astype(q.dtype)), d_state)
    groups = lambda d, x: _sum_groups(d.reshape(*x.shape[:2], heads, x.shape[-1]), x)  # noqa: E731
    d_log_decay = _gate_gradient(d_gates, segment_ids)
    return groups(dq, q), groups(dk, k), groups(dv, v), d_log_decay, d_initial_state, None


_scalar_decay.defvjp(_scalar_decay_forward, _scalar_decay_backward)


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
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
        functools.partial(_forward_kernel, scale=scale),
        grid=plan.grid,
        in_specs=[*map(plan.tokens, (q, k, v)), plan.tiles(), plan.state()],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plan.compiler_params,
        interpret=interpret,
        name="scalar_decay_forward",
    )(_lanes(q), _lanes(k), _lanes(v), _gate_tiles(log_decay, segment_ids, scale), initial_state)
    return out.reshape(batch, length, heads, value_dim), *states


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
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        q, k, v = q_ref[tokens, :], k_ref[tokens, :], v_ref[tokens, :]
        gates, state = _Gates.of(gates_ref[chunk], scale), state_ref[...]
        inside = _dot(_times(_dot(q, k, 1, 1), gates.decay, v.dtype), v, 1, 0)
        read = gates.read * _dot(q, state.astype(q.dtype), 1, 0)
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
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        gates = _Gates.of(gates_ref[chunk], scale)
        states_ref[chunk + 1] = _next_state(states_ref[chunk], k_ref[tokens, :], v_ref[tokens, :], gates)

    for chunk in reversed(range(chunks)):
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        q, k, v, d_out = q_ref[tokens, :], k_ref[tokens, :], v_ref[tokens, :], d_out_ref[tokens, :]
        gates, state, d_state = _Gates.of(gates_ref[chunk], scale), states_ref[chunk], d_state_ref[...]
        scores = _dot(q, k, 1, 1)
        d_scores = _dot(d_out, v, 1, 1) * gates.decay
        pairs = jnp.where(_distance() > 0, scores * d_scores, 0)
        scores, d_scores = _times(scores, gates.decay, q.dtype), d_scores.astype(q.dtype)
        rounded = d_state.astype(q.dtype)

        dq_read = gates.read * _dot(d_out, state.astype(q.dtype), 1, 1)
        dk_written = gates.write * _dot(v, rounded, 1, 1)
        dv_written = gates.write * _dot(k, rounded, 1, 0)
        dq_ref[tokens, :] = (_dot(d_scores, k, 1, 0) + dq_read).astype(dq_ref.dtype)
        dk_ref[tokens, :] = (_dot(d_scores, q, 0, 0) + dk_written).astype(dk_ref.dtype)
        dv_ref[tokens, :] = (_dot(scores, d_out, 0, 0) + dv_written).astype(dv_ref.dtype)
        d_state_ref[...] = gates.keep * d_state + _dot(_times(q, gates.read, q.dtype), d_out, 0, 0)

        after = jnp.sum(pairs, 1, keepdims=True) + jnp.sum(q * dq_read, 1, keepdims=True)
        before = jnp.sum(k * dk_written, 1, keepdims=True)
        through = gates.keep * jnp.sum(jnp.sum(state * d_state, 1, keepdims=True), 0, keepdims=True)
        lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, 8), 1)
        tile = jnp.where(lane == 0, after, jnp.where(lane == 1, before, through)).T
        row = jax.lax.broadcasted_iota(jnp.int32, (8, CHUNK), 0)
        d_gates_ref[chunk] = tile - jnp.where(row == 0, jnp.sum(pairs, 0, keepdims=True), 0)


def _next_state(state: jax.Array, k: jax.Array, v: jax.Array, gates: "_Gates") -> jax.Array:
    return gates.keep * state + _dot(_times(k, gates.write, k.dtype), v, 0, 0)


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """The product over an axis of each, accumulated in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def _times(x: jax.Array, factor: jax.Array, dtype: Any) -> jax.Array:
    """The product in float32, rounded once."""
    return (x * factor).astype(dtype)


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
        gates = jnp.where(_document_starts(segment_ids)[..., None], ZERO_DECAY, jnp.where(real, gates, 0))
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
    return jnp.where(((segment_ids >= 0) & ~_document_starts(segment_ids))[..., None], gradient, 0)


def _document_starts(segment_ids: jax.Array) -> jax.Array:
    """[B, T] the first token of every document but the first of a row: to that one belongs the state before the row."""
    before = jax.lax.cummax(jnp.maximum(segment_ids, -1), axis=1)[:, :-1]
    before = jnp.pad(before, ((0, 0), (1, 0)), constant_values=-1)
    return (segment_ids >= 0) & (before >= 0) & (segment_ids != before)


# The layout in HBM, and which block of it a step of the grid has.


class _Plan:
    """Blocks of T / block steps, in the order of time or `reverse`."""

    def __init__(self, tokens: jax.Array, state: jax.Array, reverse: bool) -> None:
        batch, length = tokens.shape[:2]
        chunks = length // CHUNK
        largest = BLOCK if max(state.shape[2:]) * tokens.dtype.itemsize <= 512 else BLOCK // 2  # as VMEM allows
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
        return pl.BlockSpec((None, None, self.chunks, 8, CHUNK), lambda b, h, n: (b, h, self._time(n), 0, 0))

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
