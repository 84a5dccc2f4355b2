"""A matrix memory walked over the chunks of a row on Hopper GPUs, whose readings inside a chunk are made elsewhere.

    O = A V + R S        S' = diag(keep) S + W^T V

for every chunk of 64 tokens, from the first to the last, or with A^T from the last to the first. Decays, scales and
masks are in the decayed queries R, the decayed keys W and the scores A already.

Floors, B4 T8192 H16 K = V = 128: R, W, V and O once are 0.54 GB and A is 0.07 GB, 0.14 ms at 4.25 TB/s; the products
are 43 GFLOP, 0.05 ms at 790 TFLOP/s.

Schedule. A block of threads walks along one row, one head and 64 columns of v; the state [K, 64] stays in the registers
of one warpgroup in float32, with a copy in shared memory to read from. A second warpgroup keeps the copies of the next
chunks in flight (TMA). All products of a chunk are in flight together: none but the read of the next chunk waits for
the new state.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64
COLUMNS = 64  # of v, of a block of threads
PIECE = 128  # rows of the state that are changed at a time
PROCESSORS = 132  # of an H100 or H200; each takes one block of threads

WGMMA = plgpu.Layout.WGMMA


def memory_scan(
    reads: jax.Array | None,
    writes: jax.Array,
    v: jax.Array,
    scores: jax.Array | None,
    keep: jax.Array,
    initial_state: jax.Array,
    *,
    reverse: bool = False,
    keep_states: bool = False,
    interpret: Any = False,
) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
    """Out [B, T, H, V] in v's dtype, the last state [B, H, K, V] in float32, and where they are kept the states that
    enter the chunks, [B, H, N, K, V] in v's dtype. Without `reads` and `scores` the memory is only written.

    Args:
      reads, writes: [B, T, heads, K], v: [B, T, heads, V]; heads divide H, each serves consecutive ones. T, K and V are
        multiples of 64, K at most 256.
      scores: [B, H, N, 64, 64]: A, rows are those who read.
      keep: [B, H, N, K], float32.
      initial_state: [B, H, K, V], float32: what the first chunk (the last one, in reverse) finds.
      reverse: from the last chunk to the first; A is read transposed.
      interpret: of `pallas_call`.
    """
    batch, length, _, key_dim = writes.shape
    value_dim, heads = v.shape[-1], initial_state.shape[1]
    chunks, dtype = length // CHUNK, v.dtype
    piece = min(PIECE, key_dim)
    pieces = [pl.ds(start, piece) for start in range(0, key_dim, piece)]

    def kernel(
        reads_ref: Any,
        writes_ref: Any,
        v_ref: Any,
        scores_ref: Any,
        keep_ref: Any,
        start_ref: Any,
        out_ref: Any,
        state_ref: Any,
        states_ref: Any,
        state_smem: Any,
        out_smem: Any,
    ) -> None:
        part, head, row = lax.axis_index("part"), lax.axis_index("head"), lax.axis_index("row")
        columns = pl.ds(part * COLUMNS, COLUMNS)
        served = lambda ref: lax.div(head, jnp.int32(heads // ref.shape[2]))  # noqa: E731
        chunk_of = lambda n: chunks - 1 - n if reverse else n  # noqa: E731
        is_copied = reads_ref is not None or states_ref is not None

        def put_state(state: tuple[jax.Array, ...]) -> None:
            for rows, values in zip(pieces, state, strict=True):
                state_smem[rows, :] = values.astype(dtype)
            plgpu.commit_smem()

        def around(pipeline: Any) -> None:
            start = tuple(
                plgpu.load(start_ref.at[row, head, rows, columns], layout=WGMMA, optimized=False) for rows in pieces
            )
            if is_copied:
                put_state(start)
            state = pipeline(start)
            for rows, values in zip(pieces, state, strict=True):
                state_ref[row, head, rows, columns] = values
            plgpu.wait_smem_to_gmem(0)

        def body(indices: Any, *refs: Any) -> tuple[jax.Array, ...]:
            *tiles, state = refs
            writes_s, v_s, keep_s = tiles[:3]
            chunk = chunk_of(indices[0])
            if states_ref is not None:
                plgpu.copy_smem_to_gmem(state_smem, states_ref.at[row, head, chunk, :, columns])

            def read(acc: Any) -> jax.Array:
                reads_s, scores_s = tiles[3:]
                plgpu.wgmma(acc, reads_s, state_smem)
                plgpu.wgmma(acc, scores_s.T if reverse else scores_s, v_s)
                return acc[...]

            if reads_ref is not None:
                out = pl.run_scoped(read, plgpu.ACC((CHUNK, COLUMNS), jnp.float32))
                plgpu.wait_smem_to_gmem(1 if states_ref is not None else 0, wait_read_only=True)
                out_smem[...] = out.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem, out_ref.at[row, pl.ds(chunk * CHUNK, CHUNK), head, columns])
            after = []
            for rows, values in zip(pieces, state, strict=True):

                def write(acc: Any, rows: Any = rows) -> jax.Array:
                    plgpu.wgmma(acc, writes_s.at[:, rows].T, v_s)
                    return acc[...]

                change = pl.run_scoped(write, plgpu.ACC((piece, COLUMNS), jnp.float32))
                kept = plgpu.load(keep_s.at[0, rows], layout=WGMMA.reduce(1), optimized=False)
                after.append(values * lax.broadcast_in_dim(kept, values.shape, [0]) + change)
            if states_ref is not None:
                plgpu.wait_smem_to_gmem(0 if reads_ref is None else 1, wait_read_only=True)
            if is_copied:
                put_state(tuple(after))
            else:
                plgpu.commit_smem()  # ends the loads, as `put_state` does: ptxas may else move them below the release
            return tuple(after)

        tile = lambda columns, place: plgpu.BlockSpec((CHUNK, columns), place)  # noqa: E731
        inputs = [
            (tile(key_dim, lambda n: (chunk_of(n), 0)), writes_ref.at[row, :, served(writes_ref), :]),
            (tile(COLUMNS, lambda n: (chunk_of(n), part)), v_ref.at[row, :, served(v_ref), :]),
            (plgpu.BlockSpec((1, key_dim), lambda n: (chunk_of(n), 0)), keep_ref.at[row, head]),
        ]
        if reads_ref is not None:
            inputs += [
                (tile(key_dim, lambda n: (chunk_of(n), 0)), reads_ref.at[row, :, served(reads_ref), :]),
                (tile(CHUNK, lambda n: (chunk_of(n), 0)), scores_ref.at[row, head]),
            ]
        specs, arrays = zip(*inputs, strict=True)
        step: Any = body
        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(chunks,),
            max_concurrent_steps=min(4 if key_dim <= 64 else 3 if key_dim <= 128 else 2, max(1, chunks)),
            num_compute_wgs=1,
            memory_registers=40,
            wg_axis="wg",
            compute_context=around,
            in_specs=list(specs),
        )(*arrays)

    shape = jax.ShapeDtypeStruct
    if scores is not None:
        scores = scores.reshape(batch, heads, chunks * CHUNK, CHUNK)
    return plgpu.kernel(
        kernel,
        out_type=(
            None if reads is None else shape((batch, length, heads, value_dim), dtype),
            shape(initial_state.shape, jnp.float32),
            shape((batch, heads, chunks, key_dim, value_dim), dtype) if keep_states else None,
        ),
        grid=(value_dim // COLUMNS, heads, batch),
        grid_names=("part", "head", "row"),
        num_threads=2,
        thread_name="wg",
        scratch_types=(plgpu.SMEM((key_dim, COLUMNS), dtype), plgpu.SMEM((CHUNK, COLUMNS), dtype)),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(reads, writes, v, scores, keep, initial_state)


def number_of_parts(batch: int, heads: int, chunks: int, value_dim: int) -> int:
    """So many that the blocks come near the number of processors, a divisor of the chunks. A second part costs a pass
    over writes and v: it pays where less than half of the processors had work."""
    most = PROCESSORS // (batch * heads * (value_dim // COLUMNS))
    return max(parts for parts in range(1, max(1, min(most, chunks)) + 1) if chunks % parts == 0)


def memory_scan_in_parts(
    reads: jax.Array | None,
    writes: jax.Array,
    v: jax.Array,
    scores: jax.Array | None,
    keep: jax.Array,
    initial_state: jax.Array,
    *,
    parts: int | None = None,
    reverse: bool = False,
    keep_states: bool = False,
    interpret: Any = False,
) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
    """`memory_scan`, its rows cut into parts that run side by side; None: as many as fill the chip.

    What enters a part is composed of what those before it write when they start from nothing, which is a pass of its
    own.
    """
    batch, length = writes.shape[:2]
    heads, value_dim, chunks = initial_state.shape[1], v.shape[-1], length // CHUNK
    parts = number_of_parts(batch, heads, chunks, value_dim) if parts is None else parts
    options = {"reverse": reverse, "interpret": interpret}
    if parts == 1:
        return memory_scan(reads, writes, v, scores, keep, initial_state, keep_states=keep_states, **options)

    def cut_tokens(y: jax.Array) -> jax.Array:
        return y.reshape(batch * parts, length // parts, *y.shape[2:])

    def cut_chunks(y: jax.Array) -> jax.Array:
        y = y.reshape(batch, heads, parts, chunks // parts, *y.shape[3:])
        return jnp.moveaxis(y, 2, 1).reshape(batch * parts, heads, *y.shape[3:])

    writes, v, keep = cut_tokens(writes), cut_tokens(v), cut_chunks(keep)
    reads = None if reads is None else cut_tokens(reads)
    scores = None if scores is None else cut_chunks(scores)
    nothing = jnp.zeros((batch * parts, *initial_state.shape[1:]), jnp.float32)
    written = memory_scan(None, writes, v, None, keep, nothing, **options)[1]
    written = written.reshape(batch, parts, *initial_state.shape[1:])
    kept = jnp.prod(keep, 2).reshape(batch, parts, heads, -1, 1)
    entering, state = [], initial_state
    for part in reversed(range(parts)) if reverse else range(parts):
        entering.append(state)
        state = kept[:, part] * state + written[:, part]
    start = jnp.stack(entering[::-1] if reverse else entering, 1).reshape(batch * parts, *initial_state.shape[1:])
    out, states, kept_states = memory_scan(reads, writes, v, scores, keep, start, keep_states=keep_states, **options)
    last = states.reshape(batch, parts, *initial_state.shape[1:])[:, 0 if reverse else -1]
    if kept_states is not None:
        kept_states = jnp.moveaxis(kept_states.reshape(batch, parts, *kept_states.shape[1:]), 1, 2)
        kept_states = kept_states.reshape(batch, heads, chunks, *kept_states.shape[4:])
    return None if out is None else out.reshape(batch, length, *out.shape[2:]), last, kept_states
