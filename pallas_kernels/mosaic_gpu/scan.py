"""One chunked scan of a matrix memory on Hopper GPUs: the kernel that scalar decay runs forward and backward.

    O_i = sum_j [j <= i] e^{a_i + b_j} (q_i . k_j) v_j + r_i S^T q_i        S' = keep S + sum_j w_j k_j v_j^T

for every chunk of 128 tokens, from the first to the last or, with j >= i, from the last to the first. What the factors
a, b, r, w and keep mean is the caller's affair; all of them are made outside, from sums of gates.

Schedule. A block of threads walks along one row, one head and 64 columns of v; the state [K, 64] never leaves it.
  memory warpgroup   TMA copies of q, k [128, K], v [128, 64] and the factors, two chunks deep.
  two warpgroups     64 tokens each: scores (q k^T), their decay, then the products with v; each keeps half the rows of
                     the state in registers (float32) and writes them to shared memory (bfloat16) for the other to read.
Per warpgroup and chunk, one product after the other: q k^T, while w v goes to shared memory; with the state; the
decayed scores with v; the change of the state. Barriers a chunk: one when w v and the state are in shared memory, one
when both have read them.

What was tried, B4 T8192 H16 K = V = 128, bfloat16, jax 0.11.2, milliseconds:
  0.274          as it is, forward with the factors, on an H200
  0.277          the kernel alone, on an H100
  0.280          there: decays first, then the other three products in flight together
  0.315          there: both products with the state before the decays, the barrier split around the last product
  0.412          on an H200: the products with the state in flight while the decays are made, the new state stored while
                 the last one runs
The later ones keep more accumulators at once, and ptxas has 168 registers a thread for all three warpgroups: it spills
up to 316 bytes. With x and the other states loaded at the start of a chunk, to hide their way from memory, the scans of
dk and dq took 0.43 and 0.52 on an H100; with x alone loaded late, and no states kept or read, 0.34 on an H200. Today's
scans, all loads late, were timed only within the whole backward pass, before rows could be cut into parts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 128
ROWS = 64  # tokens of a warpgroup
COLUMNS = 64  # of v, of a block of threads
STEPS = 2  # chunks in flight
FACTORS = ("a", "b", "r", "w", "keep")

WGMMA = plgpu.Layout.WGMMA


class Extras(NamedTuple):
    """What gradients of gates are made of, in float32; None where it was not asked for."""

    inside: Any  # [B, H, T]: sums over channels of x and of what comes from the chunk itself,
    before: Any  # and of what comes from the state that enters it
    states: Any  # [B, H, N, K, V], v's dtype: the state that enters each chunk
    overlap: Any  # [B, H, N]: its product with another one


class Factors(NamedTuple):
    """Of every token [B, H, N, C], in float32; a and b are logarithms to base 2, and -1e30 where nothing is read or
    written."""

    a: jax.Array
    b: jax.Array
    r: jax.Array
    w: jax.Array
    keep: jax.Array


def scan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    factors: Factors,
    initial_state: jax.Array,
    x: jax.Array | None = None,
    others: jax.Array | None = None,
    *,
    reverse: bool = False,
    keep_states: bool = False,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, Extras]:
    """Out [B, T, H, V] in v's dtype, the last state [B, H, K, V] in float32, and extras: `inside` and `before` where x
    is given, `states` where they are kept, `overlap` where `others` are given.

    Args:
      q, k: [B, T, heads, K], v: [B, T, heads, V], x: [B, T, heads, V]; heads divide H, each serves consecutive ones.
        T is a multiple of 128, K is 64 or 128, V a multiple of 64.
      factors: of the tokens, see above.
      initial_state: [B, H, K, V], float32: what the first chunk (the last one, in reverse) finds.
      others: [B, H, N, K, V] in v's dtype, states of another scan over the same chunks.
      reverse: from the last chunk to the first; a token reads those after it and itself.
      interpret: of `pallas_call`; then products take their left side from shared memory.
    """
    batch, length, _, key_dim = q.shape
    value_dim, heads = v.shape[-1], initial_state.shape[1]
    chunks = length // CHUNK
    packed = jnp.stack(factors, 3).reshape(batch, heads, chunks * len(FACTORS), CHUNK)
    slices = value_dim // COLUMNS
    split = key_dim > ROWS  # of the rows of the state over the warpgroups; else both keep all
    state_rows = key_dim // 2 if split else key_dim
    dtype = v.dtype

    def kernel(
        q_ref: Any,
        k_ref: Any,
        v_ref: Any,
        factors_ref: Any,
        start_ref: Any,
        x_ref: Any,
        others_ref: Any,
        out_ref: Any,
        state_ref: Any,
        dots_ref: Any,
        states_ref: Any,
        overlap_ref: Any,
        written: Any,
        state_smem: Any,
        out_smem: Any,
        scores_smem: Any,
        ready: Any,
        consumed: Any,
    ) -> None:
        part, head, row = lax.axis_index("part"), lax.axis_index("head"), lax.axis_index("row")
        wg = lax.axis_index("wg")
        mine, columns = pl.ds(wg * ROWS, ROWS), pl.ds(part * COLUMNS, COLUMNS)
        own_rows = pl.ds(wg * state_rows, state_rows) if split else pl.ds(0, state_rows)
        served = lambda ref: lax.div(head, jnp.int32(heads // ref.shape[2]))  # noqa: E731
        chunk_of = lambda n: chunks - 1 - n if reverse else n  # noqa: E731

        def put_state(state: jax.Array) -> None:
            def put() -> None:
                state_smem[own_rows, :] = state.astype(dtype)

            put() if split else pl.when(wg == 0)(put)

        def around(pipeline: Any) -> None:
            start = plgpu.load(start_ref.at[row, head, own_rows, columns], layout=WGMMA, optimized=False)
            put_state(start)
            state = pipeline(start)

            def put() -> None:
                state_ref[row, head, own_rows, columns] = state

            put() if split else pl.when(wg == 0)(put)
            plgpu.wait_smem_to_gmem(0)

        def body(indices: Any, q_s: Any, k_s: Any, v_s: Any, f_s: Any, state: jax.Array) -> jax.Array:
            chunk = chunk_of(indices[0])
            tokens = pl.ds(chunk * CHUNK + wg * ROWS, ROWS)
            of_rows = lambda name: plgpu.load(  # noqa: E731
                f_s.at[FACTORS.index(name), mine], layout=WGMMA.reduce(1), optimized=False
            )
            down = lambda vector, shape: lax.broadcast_in_dim(vector, shape, [0])  # noqa: E731

            def scores(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, q_s.at[mine], k_s.T)
                values = plgpu.load(v_s.at[mine], layout=WGMMA, optimized=False).astype(jnp.float32)
                written[mine, :] = (values * down(of_rows("w"), values.shape)).astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready)
                return acc[...]

            qk = pl.run_scoped(scores, plgpu.ACC((ROWS, CHUNK), jnp.float32))
            plgpu.barrier_wait(ready)
            if states_ref is not None:
                half = pl.ds(wg * (key_dim // 2), key_dim // 2)
                plgpu.copy_smem_to_gmem(state_smem.at[half], states_ref.at[row, head, chunk, half, columns])

            def read(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, q_s.at[mine], state_smem)
                return acc[...]

            def inside(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, scores_smem.at[mine] if interpret else decayed, v_s)
                return acc[...]

            def write(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, (k_s.at[:, own_rows] if split else k_s).T, written)
                return acc[...]

            before = pl.run_scoped(read, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
            b = plgpu.load(f_s.at[FACTORS.index("b")], layout=WGMMA.reduce(0), optimized=False)
            exponent = down(of_rows("a"), qk.shape) + lax.broadcast_in_dim(b, qk.shape, [1])
            i = plgpu.broadcasted_iota(jnp.int32, qk.shape, 0, layout=WGMMA) + wg * ROWS
            j = plgpu.broadcasted_iota(jnp.int32, qk.shape, 1, layout=WGMMA)
            exponent = jnp.where(j >= i if reverse else j <= i, exponent, -1e30)
            decayed = (qk * jnp.exp2(exponent)).astype(dtype)
            if interpret:
                scores_smem[mine, :] = decayed
                plgpu.commit_smem()
            out = pl.run_scoped(inside, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
            before = before * down(of_rows("r"), out.shape)
            if x_ref is not None:
                factor = plgpu.load(x_ref.at[row, tokens, served(x_ref), columns], layout=WGMMA, optimized=False)
                factor = factor.astype(jnp.float32)
                dots_ref[part, 0, row, head, tokens] = jnp.sum(out * factor, axis=1)
                dots_ref[part, 1, row, head, tokens] = jnp.sum(before * factor, axis=1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[mine, :] = (out + before).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[mine], out_ref.at[row, tokens, head, columns])
            if others_ref is not None:
                other = plgpu.load(others_ref.at[row, head, chunk, own_rows, columns], layout=WGMMA, optimized=False)
                overlap = jnp.sum(state * other.astype(jnp.float32), axis=1)

                def put() -> None:
                    overlap_ref[part, row, head, chunk, own_rows] = overlap

                put() if split else pl.when(wg == 0)(put)
            change = pl.run_scoped(write, plgpu.ACC((state_rows, COLUMNS), jnp.float32))
            keep = plgpu.load(
                f_s.at[FACTORS.index("keep"), pl.ds(0, state_rows)], layout=WGMMA.reduce(1), optimized=False
            )
            state = state * down(keep, state.shape) + change
            if states_ref is not None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(consumed)
            plgpu.barrier_wait(consumed)
            put_state(state)
            return state

        tile = lambda columns, place: plgpu.BlockSpec((CHUNK, columns), place)  # noqa: E731
        step: Any = body
        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(chunks,),
            max_concurrent_steps=STEPS,
            num_compute_wgs=2,
            memory_registers=40,
            wg_axis="wg",
            compute_context=around,
            in_specs=[
                tile(key_dim, lambda n: (chunk_of(n), 0)),
                tile(key_dim, lambda n: (chunk_of(n), 0)),
                tile(COLUMNS, lambda n: (chunk_of(n), part)),
                plgpu.BlockSpec((len(FACTORS), CHUNK), lambda n: (chunk_of(n), 0)),
            ],
        )(
            q_ref.at[row, :, served(q_ref), :],
            k_ref.at[row, :, served(k_ref), :],
            v_ref.at[row, :, served(v_ref), :],
            factors_ref.at[row, head],
        )

    shape = jax.ShapeDtypeStruct
    bf16 = lambda *size: plgpu.SMEM(size, dtype)  # noqa: E731
    out, state, dots, states, overlap = plgpu.kernel(
        kernel,
        out_type=(
            shape((batch, length, heads, value_dim), dtype),
            shape(initial_state.shape, jnp.float32),
            None if x is None else shape((slices, 2, batch, heads, length), jnp.float32),
            shape((batch, heads, chunks, key_dim, value_dim), dtype) if keep_states else None,
            None if others is None else shape((slices, batch, heads, chunks, key_dim), jnp.float32),
        ),
        grid=(slices, heads, batch),
        grid_names=("part", "head", "row"),
        num_threads=3,
        thread_name="wg",
        scratch_types=(
            bf16(CHUNK, COLUMNS),
            bf16(key_dim, COLUMNS),
            bf16(CHUNK, COLUMNS),
            bf16(CHUNK, CHUNK) if interpret else None,
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(q, k, v, packed, initial_state, x, others)
    inside, before = (None, None) if dots is None else jnp.sum(dots, 0)
    return out, state, Extras(inside, before, states, None if overlap is None else jnp.sum(overlap, (0, 4)))
