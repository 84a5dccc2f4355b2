"""What a chunk of vector decay needs beside its values, made for all chunks at once on Hopper GPUs.

    A_ij = scale sum_c q_ic k_jc e^{gates after j up to i}        for j < i, and scale q_i . k_i or q_i . (u k_i)
    reads_i = scale q_i e^{gates up to i}        writes_j = k_j e^{gates after j}        keep = e^{all gates}

Floors, B4 T8192 H16 K = 128: q, k and float32 gates in, reads, writes and A out are 0.87 GB, 0.20 ms at 4.25 TB/s. The
products are 14 of 64 x 64 x K a chunk, eight exponents and the scores of six levels: 0.12 TFLOP, 0.15 ms at 790
TFLOP/s. Exponentials: 8 a token and channel, 0.13 ms at 16 a cycle and processor.

Schedule. A block is one warpgroup with one chunk of one head; several share a processor, one loading while others
multiply. Queries and keys come by TMA; gates go through registers into shared memory. The loop over levels is bound by
instructions, about 700 a thread and level of 128 channels, not by products.

What was tried, B4 T8192 H16 K = 128, milliseconds. On an H100, of this kernel:
  0.755   gates in two bfloat16 parts, 64 channels at a time, masks that stay the same over the levels
  0.577   gates in float16, 64 channels at a time
  0.556   the same, 128 channels at a time (255 registers a thread, no spills)
On an H200, of the forward pass of vector decay, without and with a bonus:
  0.742, 0.748   the last of these
  0.706, 0.713   what depends on rows or columns alone made of vectors, no rounding of zeros and ones; 218 registers,
                 two blocks a processor
  0.655, 0.746   the same, 64 channels at a time; 157 registers, three blocks
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import pair_levels as pairs
from pallas_kernels.mosaic_gpu.pair_levels import CHUNK, GATES, INTO, LEVELS, OUT_OF, THROUGH, WHOLE

COLUMNS = {False: 64, True: 128}  # channels at a time, without a bonus and with one
LOG2E = math.log2(math.e)


def vector_scores(
    q: jax.Array,
    k: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array | None,
    documents: jax.Array | None,
    *,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A [B, H, N, 64, 64], reads and writes [B, T, H, K] in q's dtype, keep [B, H, N, K] in float32.

    Args:
      q, k: [B, T, heads, K]; heads divide H, each serves consecutive ones. T and K are multiples of 64.
      log_decay: [B, T, H, K], float32.
      bonus: [H, K], float32: then queries read before the write of their token.
      documents: [B, N, 5, 64], float32: of the document of each token its first place in the chunk and the one after
        its last, and 1 or 0 for whether it is the one that enters the chunk, whether it is the one that leaves,
        whether one passes through.
      scale: on A and reads.
      interpret: of `pallas_call`.
    """
    batch, length, _, key_dim = q.shape
    heads, chunks, dtype = log_decay.shape[2], length // CHUNK, q.dtype
    before = bonus is not None
    width = min(COLUMNS[before], key_dim)
    slices = [pl.ds(start, width) for start in range(0, key_dim, width)]

    def kernel(
        q_ref: Any,
        k_ref: Any,
        gates_ref: Any,
        bonus_ref: Any,
        documents_ref: Any,
        zero_ref: Any,
        scores_ref: Any,
        reads_ref: Any,
        writes_ref: Any,
        keep_ref: Any,
        q_s: Any,
        k_s: Any,
        gates_s: Any,
        decayed: Any,
        out_s: Any,
        left: Any,
        loaded: Any,
    ) -> None:
        chunk, head, row = lax.axis_index("chunk"), lax.axis_index("head"), lax.axis_index("row")
        tokens, hidden = pl.ds(chunk * CHUNK, CHUNK), zero_ref[0]
        served = lambda ref: lax.div(head, jnp.int32(heads // ref.shape[2]))  # noqa: E731
        plgpu.copy_gmem_to_smem(q_ref.at[row, tokens, served(q_ref), :], q_s, loaded)
        plgpu.copy_gmem_to_smem(k_ref.at[row, tokens, served(k_ref), :], k_s, loaded)
        of_documents = None if documents_ref is None else documents_ref.at[row, chunk]
        for columns in slices:
            gates = pairs.load(gates_ref.at[row, tokens, head, columns]) * LOG2E
            pairs.put_gates(gates, gates_s.at[:, columns])
            kept = jnp.exp2(jnp.sum(gates, axis=0))
            if of_documents is not None:
                kept = kept * documents_ref[row, chunk, THROUGH, 0]
            keep_ref[row, head, chunk, columns] = kept
        plgpu.commit_smem()
        plgpu.barrier_wait(loaded)

        def decay(pattern: jax.Array, columns: Any) -> jax.Array:
            return jnp.exp2(pairs.sums(pattern, gates_s.at[:, columns], hidden, left))

        i, j = pairs.rows_and_columns()
        own = []  # q . k of each token, of the channels of each slice
        for columns in slices:
            bonded = pairs.load(k_s.at[:, columns])
            if bonus_ref is not None:
                bonded = bonded * pairs.along(pairs.load_columns(bonus_ref.at[head, columns]))
            own.append(jnp.sum(pairs.load(q_s.at[:, columns]) * bonded, axis=1))
        scores = jnp.where(i == j, pairs.down(functools.reduce(jnp.add, own)), jnp.float32(0))

        def add_level(level: jax.Array, scores: jax.Array) -> jax.Array:
            plgpu.commit_smem()  # all warps are done with the products of the level before
            for columns in slices:
                queries, keys = pairs.load(q_s.at[:, columns]), pairs.load(k_s.at[:, columns])
                source = jnp.where(pairs.is_upper(level, width), queries, keys)
                decayed[:, columns] = (source * decay(pairs.gates_of_level(level, before), columns)).astype(dtype)
            plgpu.commit_smem()

            def all_pairs(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, decayed, decayed.T)
                return acc[...]

            of_level = pl.run_scoped(all_pairs, plgpu.ACC((CHUNK, CHUNK), jnp.float32))
            return jnp.where(pairs.is_pair(level), of_level, scores)

        # a loop: layouts of six copies of this body take the compiler seconds
        scores = lax.fori_loop(0, LEVELS, add_level, scores)
        if of_documents is not None:
            scores = jnp.where(pairs.in_document(of_documents), scores, jnp.float32(0))
        out_s[...] = jnp.where(i >= j, scores * scale, jnp.float32(0)).astype(dtype)
        plgpu.commit_smem()
        for columns in slices:
            reads = pairs.load(q_s.at[:, columns]) * decay(pairs.gates_of_query(WHOLE, before), columns) * scale
            if of_documents is not None:
                reads = reads * pairs.down(pairs.load_rows(of_documents.at[INTO]), width)
            decayed[:, columns] = reads.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, scores_ref.at[row, head, chunk])
        plgpu.copy_smem_to_gmem(decayed, reads_ref.at[row, tokens, head, :])
        for columns in slices:
            writes = pairs.load(k_s.at[:, columns]) * decay(pairs.gates_of_key(WHOLE), columns)
            if of_documents is not None:
                writes = writes * pairs.down(pairs.load_rows(of_documents.at[OUT_OF]), width)
            k_s[:, columns] = writes.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_s, writes_ref.at[row, tokens, head, :])
        plgpu.wait_smem_to_gmem(0)

    shape = jax.ShapeDtypeStruct
    tile = lambda of=dtype: plgpu.SMEM((CHUNK, key_dim), of)  # noqa: E731
    square = lambda of: plgpu.SMEM((CHUNK, CHUNK), of)  # noqa: E731
    scores, reads, writes, keep = plgpu.kernel(
        kernel,
        out_type=(
            shape((batch, heads, chunks, CHUNK, CHUNK), dtype),
            shape((batch, length, heads, key_dim), dtype),
            shape((batch, length, heads, key_dim), dtype),
            shape((batch, heads, chunks, key_dim), jnp.float32),
        ),
        grid=(chunks, heads, batch),
        grid_names=("chunk", "head", "row"),
        scratch_types=(
            tile(),
            tile(),
            tile(GATES),
            tile(),
            square(dtype),
            square(GATES) if interpret else None,
            plgpu.Barrier(num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(q, k, log_decay, bonus, documents, jnp.zeros(1))
    return scores, reads, writes, keep
