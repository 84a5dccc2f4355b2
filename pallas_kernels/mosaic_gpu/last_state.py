"""What a chunked scan leaves: the last state of every row, without reading it.

    S' = keep S + sum_j w_j k_j v_j^T        from S = 0, over the chunks in either order

The first of two passes where there are few rows: each is cut into parts, the parts run side by side, and what enters
each is composed of the last states of those before it. A warpgroup has the state of one row, one head and 64 columns of
v in registers, and another one keeps the copies of the next chunks in flight.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.scan import CHUNK, COLUMNS, WGMMA, Factors

STEPS = 4  # chunks in flight


def last_state(
    k: jax.Array, v: jax.Array, factors: Factors, heads: int, *, reverse: bool = False, interpret: Any = False
) -> jax.Array:
    """[B, H, K, V] in float32, from k [B, T, heads, K] and v [B, T, heads, V] as `scan` takes them."""
    batch, length, _, key_dim = k.shape
    chunks, dtype = length // CHUNK, v.dtype
    packed = jnp.stack([factors.w, factors.keep], 3).reshape(batch, heads, chunks * 2, CHUNK)

    def kernel(k_ref: Any, v_ref: Any, factors_ref: Any, state_ref: Any, written: Any) -> None:
        part, head, row = lax.axis_index("part"), lax.axis_index("head"), lax.axis_index("row")
        columns = pl.ds(part * COLUMNS, COLUMNS)
        served = lambda ref: lax.div(head, jnp.int32(heads // ref.shape[2]))  # noqa: E731
        chunk_of = lambda n: chunks - 1 - n if reverse else n  # noqa: E731

        def around(pipeline: Any) -> None:
            zeros = plgpu.layout_cast(jnp.zeros((key_dim, COLUMNS), jnp.float32), WGMMA)
            state_ref[row, head, :, columns] = pipeline(zeros)

        def body(_: Any, k_s: Any, v_s: Any, f_s: Any, state: jax.Array) -> jax.Array:
            w = plgpu.load(f_s.at[0], layout=WGMMA.reduce(1), optimized=False)
            values, keep = plgpu.load(v_s, layout=WGMMA, optimized=False).astype(jnp.float32), f_s[1, 0]
            plgpu.commit_smem()  # all warps are done with the product of the chunk before, and with these loads
            written[...] = (values * lax.broadcast_in_dim(w, values.shape, [0])).astype(dtype)
            plgpu.commit_smem()

            def write(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, k_s.T, written)
                return acc[...]

            change = pl.run_scoped(write, plgpu.ACC((key_dim, COLUMNS), jnp.float32))
            return state * keep + change

        step: Any = body
        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(chunks,),
            max_concurrent_steps=min(STEPS, chunks),
            num_compute_wgs=1,
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
        num_threads=2,
        thread_name="wg",
        scratch_types=(plgpu.SMEM((CHUNK, COLUMNS), dtype),),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(k, v, packed)
