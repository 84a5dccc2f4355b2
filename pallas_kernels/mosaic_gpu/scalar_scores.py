"""What a chunk of scalar decay needs for a `memory_scan`, made for all chunks at once on Hopper GPUs.

    A_ij = scale q_i . k_j e^{G_i - G_j} for j <= i       reads_i = scale e^{G_i} q_i       writes_j = e^{G_C - G_j} k_j

with G_i = g_1 + ... + g_i inside the chunk of C = 64 tokens.

Floors, B4 T8192 H16 K = 128: q, k, reads and writes once are 0.54 GB and A is 0.07 GB, 0.14 ms at 4.25 TB/s. The
products are 8.6 GFLOP.

Schedule. A block is one warpgroup with one chunk of one head; several share a processor, one loading while others
multiply.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import pair_levels as pairs
from pallas_kernels.mosaic_gpu.pair_levels import CHUNK

COLUMNS = 64  # channels at a time
NOTHING = -1e30  # an exponent


def scalar_scores(
    q: jax.Array,
    k: jax.Array,
    sums: jax.Array,
    *,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A [B, H, N, 64, 64], reads and writes [B, T, H, K], in q's dtype.

    Args:
      q, k: [B, T, heads, K]; heads divide H, each serves consecutive ones. T and K are multiples of 64.
      sums: [B, H, N, 64], float32: G log2(e).
      scale: on A and reads.
      interpret: of `pallas_call`.
    """
    batch, length, _, key_dim = q.shape
    heads, chunks, dtype = sums.shape[1], length // CHUNK, q.dtype
    slices = [pl.ds(start, COLUMNS) for start in range(0, key_dim, COLUMNS)]

    def kernel(
        q_ref: Any,
        k_ref: Any,
        sums_ref: Any,
        scores_ref: Any,
        reads_ref: Any,
        writes_ref: Any,
        q_s: Any,
        k_s: Any,
        out_s: Any,
        loaded: Any,
    ) -> None:
        chunk, head, row = lax.axis_index("chunk"), lax.axis_index("head"), lax.axis_index("row")
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        served = lambda ref: lax.div(head, jnp.int32(heads // ref.shape[2]))  # noqa: E731
        plgpu.copy_gmem_to_smem(q_ref.at[row, tokens, served(q_ref), :], q_s, loaded)
        plgpu.copy_gmem_to_smem(k_ref.at[row, tokens, served(k_ref), :], k_s, loaded)
        of_chunk = sums_ref.at[row, head, chunk]
        of_rows, total = pairs.load_rows(of_chunk), sums_ref[row, head, chunk, CHUNK - 1]
        read, write = jnp.exp2(of_rows) * scale, jnp.exp2(total - of_rows)
        plgpu.barrier_wait(loaded)

        def all_pairs(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, q_s, k_s.T)
            return acc[...]

        scores = pl.run_scoped(all_pairs, plgpu.ACC((CHUNK, CHUNK), jnp.float32))
        i, j = pairs.rows_and_columns()
        exponent = pairs.down(of_rows) - pairs.along(pairs.load_columns(of_chunk))
        decay = jnp.exp2(jnp.where(j <= i, exponent, jnp.float32(NOTHING)))
        out_s[...] = (scores * decay * scale).astype(dtype)
        plgpu.commit_smem()  # all warps are done with the product: q and k make room
        plgpu.copy_smem_to_gmem(out_s, scores_ref.at[row, head, chunk])
        for columns in slices:
            q_s[:, columns] = (pairs.load(q_s.at[:, columns]) * pairs.down(read)).astype(dtype)
            k_s[:, columns] = (pairs.load(k_s.at[:, columns]) * pairs.down(write)).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, reads_ref.at[row, tokens, head, :])
        plgpu.copy_smem_to_gmem(k_s, writes_ref.at[row, tokens, head, :])
        plgpu.wait_smem_to_gmem(0)

    shape = jax.ShapeDtypeStruct
    return plgpu.kernel(
        kernel,
        out_type=(
            shape((batch, heads, chunks, CHUNK, CHUNK), dtype),
            shape((batch, length, heads, key_dim), dtype),
            shape((batch, length, heads, key_dim), dtype),
        ),
        grid=(chunks, heads, batch),
        grid_names=("chunk", "head", "row"),
        scratch_types=(
            plgpu.SMEM((CHUNK, key_dim), dtype),
            plgpu.SMEM((CHUNK, key_dim), dtype),
            plgpu.SMEM((CHUNK, CHUNK), dtype),
            plgpu.Barrier(num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(q, k, sums)
