"""One token of a decaying matrix memory on Hopper GPUs.

    S' = diag(e^g) S + k v^T
    o = scale S'^T q                    or, with a bonus u, scale (S^T q + (q . (u * k)) v)

A block of 128 threads has some columns of the state of one head, all rows of them in registers: loads of 16 bytes a
thread, arithmetic, stores to where they came from. Each warp has its own columns, so that the sums over rows stay
within it. As many columns as make TILE elements: 64 registers a thread, and several blocks fit on a processor, whose
loads in flight together hide the way from memory.

Floor: bytes, twice the state. At B64 H16 K = V = 128: 134 MB, 0.032 ms at the 4.25 TB/s of an H200,
0.046 at the 2.9 of an H100. On an H100, in a loop of steps under one jit, where the state stays in place: 0.060 for
both decays where XLA takes 0.054; 0.067 with half as much a block and 0.060 with twice as much. With one row, whose
state stays in cache, 0.014 and 0.022 where XLA takes 0.020 and 0.022. So `implementation=None` leaves the step to XLA.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.step import run_step

TILE = 8192  # elements of the state of a block of threads
COLUMNS = (128, 64, 32)
WARPS, LANES = 4, 32
VECTOR = 4  # float32 of one load: 16 bytes


def step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    *,
    bonus: jax.Array | None = None,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The equation above for every head: out [B, 1, H, V] in q's dtype and the next state [B, H, K, V] in float32.

    Differentiable in all arrays of floats; the state is updated in place where it is not used again.

    Args:
      q, k: [B, 1, heads, K], v: [B, 1, heads, V] in bfloat16, float16 or float32; heads divide H, each serves
        consecutive ones. K and V are multiples of 64 up to 256.
      log_decay: [B, 1, H] or [B, 1, H, K], float32, <= 0.
      initial_state: [B, H, K, V], float32.
      segment_ids: [B, 1]; negative ids mark padding: the state passes, out is zero.
      bonus: [H, K], float32.
      interpret: parameters of the interpreter that runs the kernel on a CPU.

    Raises:
      NotImplementedError: other dtypes, sizes or numbers of tokens, a scale that is not a number.
    """
    return run_step(_rows, q, k, v, log_decay, bonus, initial_state, segment_ids, scale=scale, interpret=interpret)


def _rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array | None,
    initial_state: jax.Array,
    *,
    scale: float,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """The kernel, whose rows take the axes of `vmap` in."""

    @jax.custom_batching.custom_vmap
    def run(*arrays: Any) -> Any:
        return _kernel(*arrays, scale=scale, interpret=interpret)

    @run.def_vmap
    def over(size: int, batched: Any, *arrays: Any) -> Any:
        def rows(array: jax.Array, is_batched: bool) -> jax.Array:
            array = array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        out = run(*jax.tree.map(rows, arrays, tuple(batched)))
        split = jax.tree.map(lambda y: y.reshape(size, -1, *y.shape[1:]), out)
        return split, jax.tree.map(lambda _: True, split)

    return run(q, k, v, log_decay, None if bonus is None else bonus[None], initial_state)


def _kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array | None,
    initial_state: jax.Array,
    *,
    scale: float,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Of a bonus [n, H, K] each serves B / n consecutive rows."""
    batch, heads, key_dim, value_dim = initial_state.shape
    columns = next(size for size in COLUMNS if value_dim % size == 0 and key_dim * size <= TILE)
    layout = _layout(columns)

    def kernel(
        q_ref: Any, k_ref: Any, v_ref: Any, decay_ref: Any, bonus_ref: Any, state_ref: Any, out_ref: Any
    ) -> None:
        part, head, row = lax.axis_index("part"), lax.axis_index("head"), lax.axis_index("row")
        own = pl.ds(part * columns, columns)
        served = lambda ref: lax.div(head, jnp.int32(heads // ref.shape[2]))  # noqa: E731

        def vector(ref: Any, axis: int) -> jax.Array:
            """[K, columns] of a vector along an axis."""
            values = plgpu.load(ref, layout=layout.reduce(1 - axis), optimized=False).astype(jnp.float32)
            return lax.broadcast_in_dim(values, (key_dim, columns), [axis])

        state = plgpu.load(state_ref.at[row, head, :, own], layout=layout, optimized=False)
        queries = vector(q_ref.at[row, 0, served(q_ref)], 0)
        keys = vector(k_ref.at[row, 0, served(k_ref)], 0)
        values = vector(v_ref.at[row, 0, served(v_ref), own], 1)
        gates = decay_ref[row, 0, head] if len(decay_ref.shape) == 3 else vector(decay_ref.at[row, 0, head], 0)
        written = keys * values
        seen = new = jnp.exp(gates) * state + written
        if bonus_ref is not None:
            of_row = lax.div(row, jnp.int32(batch // bonus_ref.shape[0]))
            seen = state + vector(bonus_ref.at[of_row, head], 0) * written
        state_ref[row, head, :, own] = new
        out_ref[row, 0, head, own] = (scale * jnp.sum(queries * seen, axis=0)).astype(out_ref.dtype)

    state = jax.new_ref(initial_state)  # an argument that is written to: in place, if XLA need not keep the old one
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, 1, heads, value_dim), q.dtype),
        grid=(value_dim // columns, heads, batch),
        grid_names=("part", "head", "row"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(q, k, v, log_decay, bonus, state)
    return out, jax.freeze(state)


def _layout(columns: int) -> Any:
    """[K, columns] in registers: a warp has a quarter of the columns; its lanes, four columns of a row each, so many
    rows as they are enough for."""
    of_warp = columns // WARPS
    rows = LANES * VECTOR // of_warp
    tiling = plgpu.Tiling(((rows, columns), (rows, of_warp), (VECTOR,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
