"""What a chunked scan leaves: the last state of every row, without reading it.

    S' = keep S + sum_j w_j k_j v_j^T        from S = 0, over the chunks in either order

The first of two passes where there are few rows: each is cut into parts, the parts run side by side, and what enters
each is composed of the last states of those before it. The schedule is that of `scan` without q.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.scan import CHUNK, COLUMNS, ROWS, STEPS, WGMMA, Factors


def last_state(
    k: jax.Array, v: jax.Array, factors: Factors, heads: int, *, reverse: bool = False, interpret: Any = False
) -> jax.Array:
    """[B, H, K, V] in float32, from k [B, T, heads, K] and v [B, T, heads, V] as `scan` takes them."""
    batch, length, _, key_dim = k.shape
    chunks, dtype = length // CHUNK, v.dtype
    packed = jnp.stack([factors.w, factors.keep], 3).reshape(batch, heads, chunks * 2, CHUNK)
    split = key_dim > ROWS
    state_rows = key_dim // 2 if split else key_dim

    def kernel(
        k_ref: Any, v_ref: Any, factors_ref: Any, state_ref: Any, written: Any, ready: Any, consumed: Any
    ) -> None:
        part, head, row = lax.axis_index("part"), lax.axis_index("head"), lax.axis_index("row")
        wg = lax.axis_index("wg")
        mine, columns = pl.ds(wg * ROWS, ROWS), pl.ds(part * COLUMNS, COLUMNS)
        own_rows = pl.ds(wg * state_rows, state_rows) if split else pl.ds(0, state_rows)
        served = lambda ref: lax.div(head, jnp.int32(heads // ref.shape[2]))  # noqa: E731
        chunk_of = lambda n: chunks - 1 - n if reverse else n  # noqa: E731
        down = lambda vector, shape: lax.broadcast_in_dim(vector, shape, [0])  # noqa: E731

        def around(pipeline: Any) -> None:
            zeros = plgpu.layout_cast(jnp.zeros((state_rows, COLUMNS), jnp.float32), WGMMA)
            state = pipeline(zeros)

            def put() -> None:
                state_ref[row, head, own_rows, columns] = state

            put() if split else pl.when(wg == 0)(put)

        def body(_: Any, k_s: Any, v_s: Any, f_s: Any, state: jax.Array) -> jax.Array:
            w = plgpu.load(f_s.at[0, mine], layout=WGMMA.reduce(1), optimized=False)
            keep = plgpu.load(f_s.at[1, pl.ds(0, state_rows)], layout=WGMMA.reduce(1), optimized=False)
            values = plgpu.load(v_s.at[mine], layout=WGMMA, optimized=False).astype(jnp.float32)
            written[mine, :] = (values * down(w, values.shape)).astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(ready)
            plgpu.barrier_wait(ready)

            def write(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, (k_s.at[:, own_rows] if split else k_s).T, written)
                return acc[...]

            change = pl.run_scoped(write, plgpu.ACC((state_rows, COLUMNS), jnp.float32))
            plgpu.barrier_arrive(consumed)
            plgpu.barrier_wait(consumed)
            return state * down(keep, state.shape) + change

        step: Any = body
        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(chunks,),
            max_concurrent_steps=2 * STEPS,
            num_compute_wgs=2,
            memory_registers=40,
            wg_axis="wg",
            compute_context=around,
            in_specs=[
                plgpu.BlockSpec((CHUNK, key_dim), lambda n: (chunk_of(n), 0)),
                plgpu.BlockSpec((CHUNK, COLUMNS), lambda n: (chunk_of(n), part)),
                plgpu.BlockSpec((2, CHUNK), lambda n: (chunk_of(n), 0)),
            ],
        )(k_ref.at[row, :, served(k_ref), :], v_ref.at[row, :, served(v_ref), :], factors_ref.at[row, head])

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, heads, key_dim, v.shape[-1]), jnp.float32),
        grid=(v.shape[-1] // COLUMNS, heads, batch),
        grid_names=("part", "head", "row"),
        num_threads=3,
        thread_name="wg",
        scratch_types=(
            plgpu.SMEM((CHUNK, COLUMNS), dtype),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(k, v, packed)
