"""One chunked scan of a matrix memory on Hopper GPUs: the kernel that scalar decay runs forward and backward.

    O_i = sum_j [j <= i] e^{a_i + b_j} (q_i . k_j) v_j + r_i S^T q_i        S' = keep S + sum_j w_j k_j v_j^T

for every chunk of 64 tokens, from the first to the last or, with j >= i, from the last to the first. What the factors
a, b, r, w and keep mean is the caller's affair; all of them are made outside, from sums of gates.

Schedule. A block of threads walks along one row, one head and 64 columns of v.
  memory     one warpgroup with nothing but TMA copies of q, k [64, K], v, x [64, 64] and the factors, some chunks
             ahead, and of other states, one ahead.
  scores     one warpgroup makes the decayed scores and w v of a chunk, up to two chunks ahead: nothing of it needs the
             state.
  state      one warpgroup has the state [K, 64] in registers (float32) and a copy in shared memory (bfloat16). All
             products of a chunk are in flight at once: with the state, of the scores with v, and the state's change.
             Products with other states are made meanwhile.
So the exponentials of one chunk are made while the products of the one before run.

A slot may be given back only when the loads from it have ended, which an arrival alone does not see to. The overlap
with the other states, which nothing waits for, had rows of the first warp wrong, as if loads had come after the next
copy: with D = 64 and 132 blocks of four chunks in 58 runs of 60. A fence before the arrival ends them (none of 60), at
no cost in time that could be measured (0.972 ms and 0.970).

What was tried, B4 T8192 H16 K = V = 128, bfloat16, jax 0.11.2, milliseconds on an H200 of scalar decay forward and
with the backward pass:
  0.270, 1.304   chunks of 128, two warpgroups with half of the tokens and of the state each and a memory warpgroup; x
                 and the other states loaded late, straight into registers
  0.221, 1.282   these roles, with x and the other states still loaded by the warpgroup of the state when it needs them
  0.221, 0.986   as it is
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64
COLUMNS = 64  # of v, of a block of threads
AHEAD = 2  # chunks of scores that wait for the state
SCORES, STATE, MEMORY = range(3)  # warpgroups
REGISTERS = {SCORES: 192, STATE: 240, MEMORY: 40}  # a thread
FACTORS = ("a", "b", "r", "w", "keep")

WGMMA = plgpu.Layout.WGMMA


class Factors(NamedTuple):
    """Of every token [B, H, N, C], in float32; a and b are logarithms to base 2, and -1e30 where nothing is read or
    written."""

    a: jax.Array
    b: jax.Array
    r: jax.Array
    w: jax.Array
    keep: jax.Array


class Extras(NamedTuple):
    """What gradients of gates are made of, in float32; None where it was not asked for."""

    inside: Any  # [B, H, T]: sums over channels of x and of what comes from the chunk itself,
    before: Any  # and of what comes from the state that enters it
    states: Any  # [B, H, N, K, V], v's dtype: the state that enters each chunk
    overlap: Any  # [B, H, N]: its product with another one


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
        T is a multiple of 64, K is 64 or 128, V a multiple of 64.
      factors: of the tokens, see above.
      initial_state: [B, H, K, V], float32: what the first chunk (the last one, in reverse) finds.
      others: [B, H, N, K, V] in v's dtype, states of another scan over the same chunks.
      reverse: from the last chunk to the first; a token reads those after it and itself.
      interpret: of `pallas_call`.
    """
    batch, length, _, key_dim = k.shape
    value_dim, heads = v.shape[-1], initial_state.shape[1]
    chunks, slices, dtype = length // CHUNK, value_dim // COLUMNS, v.dtype
    packed = jnp.stack(factors, 3).reshape(batch, heads, chunks * len(FACTORS), CHUNK)
    steps = min(3 if key_dim > 64 else 4, chunks)

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
        q_s: Any,
        k_s: Any,
        v_s: Any,
        factors_s: Any,
        scores_s: Any,
        written_s: Any,
        state_s: Any,
        out_s: Any,
        x_s: Any,
        others_s: Any,
        loaded: Any,
        released: Any,
        ready: Any,
        consumed: Any,
        others_loaded: Any,
        others_released: Any,
    ) -> None:
        part, head, row = lax.axis_index("part"), lax.axis_index("head"), lax.axis_index("row")
        wg = lax.axis_index("wg")
        columns = pl.ds(part * COLUMNS, COLUMNS)
        served = lambda ref: lax.div(head, jnp.int32(heads // ref.shape[2]))  # noqa: E731
        chunk_of = lambda n: chunks - 1 - n if reverse else n  # noqa: E731
        down = lambda vector, shape: lax.broadcast_in_dim(vector, shape, [0])  # noqa: E731
        load = lambda ref: plgpu.load(ref, layout=WGMMA, optimized=False).astype(jnp.float32)  # noqa: E731

        def of_rows(slot: jax.Array, name: str) -> jax.Array:
            return plgpu.load(factors_s.at[slot, FACTORS.index(name)], layout=WGMMA.reduce(1), optimized=False)

        @pl.when(wg == MEMORY)
        def memory() -> None:
            plgpu.set_max_registers(REGISTERS[MEMORY], action="decrease")

            def step(n: jax.Array, _: None) -> None:
                slot, chunk = lax.rem(n, steps), chunk_of(n)
                tokens = pl.ds(chunk * CHUNK, CHUNK)

                @pl.when(n >= steps)
                def wait() -> None:
                    plgpu.barrier_wait(released.at[slot])

                full = loaded.at[slot]
                plgpu.copy_gmem_to_smem(q_ref.at[row, tokens, served(q_ref), :], q_s.at[slot], full)
                plgpu.copy_gmem_to_smem(k_ref.at[row, tokens, served(k_ref), :], k_s.at[slot], full)
                plgpu.copy_gmem_to_smem(v_ref.at[row, tokens, served(v_ref), columns], v_s.at[slot], full)
                some = pl.ds(chunk * len(FACTORS), len(FACTORS))
                plgpu.copy_gmem_to_smem(factors_ref.at[row, head, some], factors_s.at[slot], full)
                if x_ref is not None:
                    plgpu.copy_gmem_to_smem(x_ref.at[row, tokens, served(x_ref), columns], x_s.at[slot], full)
                if others_ref is not None:
                    pl.when(n >= 1)(lambda: plgpu.barrier_wait(others_released))
                    other = others_ref.at[row, head, chunk, :, columns]
                    plgpu.copy_gmem_to_smem(other, others_s, others_loaded)

            lax.fori_loop(0, chunks, step, None)
            for slot in range(steps):
                plgpu.barrier_wait(released.at[slot])
            if others_ref is not None:
                plgpu.barrier_wait(others_released)

        @pl.when(wg == SCORES)
        def make_scores() -> None:
            plgpu.set_max_registers(REGISTERS[SCORES], action="increase")
            i = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=WGMMA.reduce(1))
            j = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=WGMMA.reduce(0))

            def step(n: jax.Array, _: None) -> None:
                slot, place = lax.rem(n, steps), lax.rem(n, AHEAD)
                plgpu.barrier_wait(loaded.at[slot])

                def multiply(acc: Any) -> jax.Array:
                    plgpu.wgmma(acc, q_s.at[slot], k_s.at[slot].T)
                    return acc[...]

                qk = pl.run_scoped(multiply, plgpu.ACC((CHUNK, CHUNK), jnp.float32))
                b = plgpu.load(factors_s.at[slot, FACTORS.index("b")], layout=WGMMA.reduce(0), optimized=False)
                exponent = down(of_rows(slot, "a"), qk.shape) + lax.broadcast_in_dim(b, qk.shape, [1])
                rows, others = down(i, qk.shape), lax.broadcast_in_dim(j, qk.shape, [1])
                exponent = jnp.where(others >= rows if reverse else others <= rows, exponent, -1e30)
                values = load(v_s.at[slot])
                values = values * down(of_rows(slot, "w"), values.shape)

                @pl.when(n >= AHEAD)
                def wait() -> None:
                    plgpu.barrier_wait(consumed.at[place])

                scores_s[place] = (qk * jnp.exp2(exponent)).astype(dtype)
                written_s[place] = values.astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.at[place])
                plgpu.barrier_arrive(released.at[slot])

            lax.fori_loop(0, chunks, step, None)
            for place in range(min(AHEAD, chunks)):
                plgpu.barrier_wait(consumed.at[place])

        @pl.when(wg == STATE)
        def carry_state() -> None:
            plgpu.set_max_registers(REGISTERS[STATE], action="increase")
            start = plgpu.load(start_ref.at[row, head, :, columns], layout=WGMMA, optimized=False)
            state_s[...] = start.astype(dtype)
            plgpu.commit_smem()

            def step(n: jax.Array, state: jax.Array) -> jax.Array:
                slot, place, chunk = lax.rem(n, steps), lax.rem(n, AHEAD), chunk_of(n)
                tokens = pl.ds(chunk * CHUNK, CHUNK)
                if states_ref is not None:
                    plgpu.copy_smem_to_gmem(state_s, states_ref.at[row, head, chunk, :, columns])
                plgpu.barrier_wait(loaded.at[slot])
                plgpu.barrier_wait(ready.at[place])

                def products(before: Any, inside: Any, change: Any) -> tuple[jax.Array, ...]:
                    plgpu.wgmma(before, q_s.at[slot], state_s)
                    plgpu.wgmma(change, k_s.at[slot].T, written_s.at[place])
                    plgpu.wgmma(inside, scores_s.at[place], v_s.at[slot])
                    if others_ref is not None:
                        plgpu.barrier_wait(others_loaded)
                        overlap = jnp.sum(state * load(others_s), axis=1)
                        plgpu.commit_smem()  # ends the loads, see above
                        plgpu.barrier_arrive(others_released)
                        overlap_ref[part, row, head, chunk] = overlap
                    return before[...], inside[...], change[...]

                before, inside, change = pl.run_scoped(
                    products,
                    plgpu.ACC((CHUNK, COLUMNS), jnp.float32),
                    plgpu.ACC((CHUNK, COLUMNS), jnp.float32),
                    plgpu.ACC((key_dim, COLUMNS), jnp.float32),
                )
                plgpu.barrier_arrive(consumed.at[place])
                before = before * down(of_rows(slot, "r"), before.shape)
                state = state * factors_s[slot, FACTORS.index("keep"), 0] + change
                dots = []
                if x_ref is not None:
                    factor = load(x_s.at[slot])
                    dots = [jnp.sum(inside * factor, axis=1), jnp.sum(before * factor, axis=1)]
                # the copies before have read what is overwritten, and all warps are done with products and loads
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(released.at[slot])
                state_s[...] = state.astype(dtype)
                out_s[...] = (inside + before).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s, out_ref.at[row, tokens, head, columns])
                for i, dot in enumerate(dots):
                    dots_ref[part, i, row, head, tokens] = dot
                return state

            state_ref[row, head, :, columns] = lax.fori_loop(0, chunks, step, start)
            plgpu.wait_smem_to_gmem(0)

    shape = jax.ShapeDtypeStruct
    slots = lambda count, *size, of=dtype: plgpu.SMEM((count, *size), of)  # noqa: E731
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
            slots(steps, CHUNK, key_dim),
            slots(steps, CHUNK, key_dim),
            slots(steps, CHUNK, COLUMNS),
            slots(steps, len(FACTORS), CHUNK, of=jnp.float32),
            slots(AHEAD, CHUNK, CHUNK),
            slots(AHEAD, CHUNK, COLUMNS),
            plgpu.SMEM((key_dim, COLUMNS), dtype),
            plgpu.SMEM((CHUNK, COLUMNS), dtype),
            None if x is None else slots(steps, CHUNK, COLUMNS),
            None if others is None else plgpu.SMEM((key_dim, COLUMNS), dtype),
            plgpu.Barrier(num_arrivals=4 if x is None else 5, num_barriers=steps),
            plgpu.Barrier(num_arrivals=2, num_barriers=steps),
            plgpu.Barrier(num_arrivals=1, num_barriers=AHEAD),
            plgpu.Barrier(num_arrivals=1, num_barriers=AHEAD),
            None if others is None else plgpu.Barrier(num_arrivals=1),
            None if others is None else plgpu.Barrier(num_arrivals=1),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(q, k, v, packed, initial_state, x, others)
    inside, before = (None, None) if dots is None else jnp.sum(dots, 0)
    return out, state, Extras(inside, before, states, None if overlap is None else jnp.sum(overlap, (0, 4)))
