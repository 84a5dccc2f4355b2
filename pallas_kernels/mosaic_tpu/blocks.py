"""What kernels that go through a row in blocks of chunks share on TPUs: sizes, the layout in HBM, small arithmetic.

The grid is (rows, heads, blocks of up to 4 chunks of 128 tokens), blocks in order. In HBM q, k and v are [B, T, H D]: a
block of one head is a slice of lanes. A state [K, V] stays in VMEM between blocks, as the block of the output that it
ends as.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

CHUNK = 128
BLOCK = 4  # chunks per step of the grid at most
LANES = 128
LARGEST = 256  # K and V
ZERO_DECAY = -120.0  # e^-120 is 0 in float32


def check_support(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> None:
    """Raises NotImplementedError for dtypes and sizes of heads that the kernels do not take."""
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


@jax.custom_jvp
def differentiable_once(x: Any) -> Any:
    """x, a tree of arrays: what a rule of differentiation makes of it has no derivative, and says so."""
    return x


@differentiable_once.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError("Mosaic TPU kernels are differentiable once")


# Arrays: around the kernels.


def fill(x: jax.Array, *axes: int) -> jax.Array:
    """Zeros after x, as many along each of the first axes."""
    return jnp.pad(x, [(0, axes[i] if i < len(axes) else 0) for i in range(x.ndim)])


def vary_like(like: jax.Array, x: jax.Array) -> jax.Array:
    """x, typed as varying over the manual mesh axes that `like` varies over."""
    axes = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def document_starts(segment_ids: jax.Array) -> jax.Array:
    """[B, T] the first token of every document but the first of a row: to that one belongs the state before the row."""
    before = jax.lax.cummax(jnp.maximum(segment_ids, -1), axis=1)[:, :-1]
    before = jnp.pad(before, ((0, 0), (1, 0)), constant_values=-1)
    return (segment_ids >= 0) & (before >= 0) & (segment_ids != before)


def lanes(x: jax.Array) -> jax.Array:
    """[B, T, H, D] -> [B, T, H D]."""
    return x.reshape(*x.shape[:2], -1)


def sum_groups(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """[B, T, H D] -> the shape of x: a head of x serves H / heads consecutive ones."""
    groups = gradient.reshape(*x.shape[:3], -1, x.shape[-1])
    return jnp.sum(groups, 3, dtype=jnp.float32).astype(x.dtype)


class Plan:
    """Which block a step of the grid has: blocks of at most `most` chunks, in the order of time or `reverse`."""

    def __init__(self, tokens: jax.Array, state: jax.Array, most: int, *, reverse: bool) -> None:
        batch, length = tokens.shape[:2]
        chunks = length // CHUNK
        self.chunks = next(n for n in range(most, 0, -1) if chunks % n == 0)
        self.grid = (batch, state.shape[1], chunks // self.chunks)
        self.state_shape = state.shape[2:]
        self.like = state
        self.compiler_params = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
        self._time: Callable[[Any], Any] = (lambda n: self.grid[2] - 1 - n) if reverse else (lambda n: n)

    def array(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        """An output that varies over the manual mesh axes that the inputs vary over."""
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(self.like).manual_axis_type)

    def array_of_heads(self, x: jax.Array) -> jax.ShapeDtypeStruct:
        """[B, T, H D], an output for x [B, T, heads, D]."""
        return self.array((*x.shape[:2], self.grid[1] * x.shape[-1]), x.dtype)

    def tokens(self, x: jax.Array) -> pl.BlockSpec:
        """A block of the head of x [B, T, heads, D] that serves the head of the step."""
        return self.lanes(x.shape[-1], self.grid[1] // x.shape[2])

    def lanes(self, dim: int, group: int = 1) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.chunks * CHUNK, dim), lambda b, h, n: (b, self._time(n), h // group))

    def tiles(self) -> pl.BlockSpec:
        """Of [B, T / C, 8, C]: eight rows a chunk, for all heads."""
        return pl.BlockSpec((None, self.chunks, 8, CHUNK), lambda b, h, n: (b, self._time(n), 0, 0))

    def tiles_of_heads(self) -> pl.BlockSpec:
        """Of [B, H, T / C, 8, C]."""
        return pl.BlockSpec((None, None, self.chunks, 8, CHUNK), lambda b, h, n: (b, h, self._time(n), 0, 0))

    def of_head(self, *shape: int) -> pl.BlockSpec:
        """All of a head's, in every step."""
        return pl.BlockSpec((None, None, *shape), lambda b, h, n: (b, h, 0, 0))

    def state(self) -> pl.BlockSpec:
        return self.of_head(*self.state_shape)

    def entering(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, *self.state_shape), lambda b, h, n: (b, h, self._time(n), 0, 0))


def run_forward(
    plan: Plan,
    kernel: Callable[..., None],
    tokens: Sequence[jax.Array],
    others: Sequence[tuple[jax.Array, pl.BlockSpec]],
    initial_state: jax.Array,
    *,
    keep_entering: bool,
    name: str,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """out, the final state, and with `keep_entering` the state that enters each block [B, H, T / block, K, V].

    Args:
      kernel: of references to `tokens`, `others` and the initial state, then to what is returned.
      tokens: [B, T, heads, D] each, the first three q, k and v.
      others: arrays and what of them a step has.
    """
    heads, key_dim, value_dim = initial_state.shape[1:]
    v = tokens[2]
    out_specs = [plan.lanes(value_dim), plan.state()]
    out_shape = [plan.array_of_heads(v), plan.array(initial_state.shape)]
    if keep_entering:
        out_specs.append(plan.entering())
        out_shape.append(plan.array((v.shape[0], heads, plan.grid[2], key_dim, value_dim)))
    out, *states = pl.pallas_call(
        kernel,
        grid=plan.grid,
        in_specs=[*map(plan.tokens, tokens), *(spec for _, spec in others), plan.state()],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plan.compiler_params,
        interpret=interpret,
        name=name,
    )(*map(lanes, tokens), *(x for x, _ in others), initial_state)
    return out.reshape(*v.shape[:2], heads, value_dim), *states


# Values: inside the kernels.


def tokens_of(chunk: Any) -> Any:
    return pl.ds(chunk * CHUNK if isinstance(chunk, int) else pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)


def dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """The product over an axis of each, accumulated in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def times(x: jax.Array, factor: jax.Array | float, dtype: Any) -> jax.Array:
    """The product in float32, rounded once."""
    return (x * factor).astype(dtype)
