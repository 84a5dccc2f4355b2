"""Gradients of vector decay inside the chunks, made for all of them at once on Hopper GPUs.

With dA_ij = scale do_i . v_j, the state S that enters a chunk and the gradient dS' of the one that leaves it:

    dq_i = sum_{j < i} dA_ij e^{gates after j up to i} k_j + scale e^{gates up to i} S do_i       + dA_ii k_i
    dk_j = sum_{i > j} dA_ij e^{gates after j up to i} q_i +       e^{gates after j} dS' v_j      + dA_jj q_j
    dg_t = sum_{i >= t} (q_i dq_i - k_i dk_i)  of the pairs and of what S gives
         + sum_{j < t} k_j dk_j of what dS' gives + e^{all gates} <S, dS'>                    channel by channel

Pairs of one level (see `pair_levels`) come from one product: with X = where(upper, q, k) e^D and dA made symmetric,
Y = dA X is what the other half sends to each row, e^D Y is the part of dq in the upper rows and of dk in the lower
ones, and X Y their part of dg. In the sum for dg the pairs on one side of t appear with both signs and cancel: they are
the same float32 products of the same rounded X and dA. Reading before the write, i > t takes the place of i >= t for
queries.

Floors, B4 T8192 H16 K = V = 128: q, k, v, do, dq and dk are 0.81 GB, gates and their gradient 0.54 GB, the states of 64
tokens 0.54 GB: 0.44 ms at 4.25 TB/s. The products are 26 of 64 x 64 x 128 a chunk: 0.22 TFLOP, 0.28 ms at 790 TFLOP/s.

Schedule. A block is one warpgroup with one chunk of one head and 64 channels of K; two share a processor. dA is made by
each of the K / 64 blocks again, from the same v and do.

What was tried, B4 T8192 H16 K = V = 128, bfloat16, on an H100, milliseconds:
  1.91    gates in two bfloat16 parts, selections instead of products with 0 and 1
  1.89    gates in float16, sums of gates' gradients in shared memory of v and do; ptxas spills 590 bytes
  1.48    nothing of 64 x 64 alive over all levels, arrays of the end used up one by one: 212 bytes
On an H200, vector decay with its backward pass took 2.837, and 2.195 when this kernel needed 662 instructions a thread
and level instead of 874, five of them reloads of spilled registers, and `vector_scores` had the same help.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import pair_levels as pairs
from pallas_kernels.mosaic_gpu.pair_levels import CHUNK, GATES, HALVES, INTO, LEVELS, OUT_OF, WHOLE
from pallas_kernels.mosaic_gpu.vector_scores import LOG2E

COLUMNS = 64  # channels of a block


def vector_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array | None,
    documents: jax.Array | None,
    d_out: jax.Array,
    states: jax.Array,
    d_states: jax.Array,
    keep: jax.Array,
    *,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """dq and dk [B, T, H, K] in q's dtype, the gradient of gates [B, T, H, K] in float32, and [B, H, N, K] in float32,
    what each chunk gives to the gradient of the bonus.

    Args: as those of `vector_scores`, and
      v: [B, T, heads, V], d_out: [B, T, H, V].
      states, d_states: [B, H, N, K, V] in v's dtype: S and dS' of each chunk.
      keep: [B, H, N, K], float32: e^{all gates} of each chunk, 0 where no document passes through.
    """
    batch, length, _, key_dim = q.shape
    heads, chunks, dtype, value_dim = log_decay.shape[2], length // CHUNK, q.dtype, v.shape[-1]
    before = bonus is not None
    shares = dtype == HALVES  # v and do make room for the sums of gates, else a processor holds one block only

    def kernel(
        q_ref: Any,
        k_ref: Any,
        v_ref: Any,
        gates_ref: Any,
        bonus_ref: Any,
        documents_ref: Any,
        d_out_ref: Any,
        states_ref: Any,
        d_states_ref: Any,
        keep_ref: Any,
        zero_ref: Any,
        dq_ref: Any,
        dk_ref: Any,
        d_gates_ref: Any,
        d_bonus_ref: Any,
        q_s: Any,
        k_s: Any,
        v_s: Any,
        d_out_s: Any,
        state_s: Any,
        d_state_s: Any,
        gates_s: Any,
        own_halves: Any,
        decayed: Any,
        overlap_s: Any,
        left_gates: Any,
        left_halves: Any,
        left: Any,
        loaded: Any,
        states_loaded: Any,
    ) -> None:
        chunk, head, row = lax.axis_index("chunk"), lax.axis_index("head"), lax.axis_index("row")
        tokens, columns = pl.ds(chunk * CHUNK, CHUNK), pl.ds(lax.axis_index("part") * COLUMNS, COLUMNS)
        hidden = zero_ref[0]
        served = lambda ref: lax.div(head, jnp.int32(heads // ref.shape[2]))  # noqa: E731
        plgpu.copy_gmem_to_smem(v_ref.at[row, tokens, served(v_ref), :], v_s, loaded)
        plgpu.copy_gmem_to_smem(d_out_ref.at[row, tokens, head, :], d_out_s, loaded)
        plgpu.copy_gmem_to_smem(q_ref.at[row, tokens, served(q_ref), columns], q_s, loaded)
        plgpu.copy_gmem_to_smem(k_ref.at[row, tokens, served(k_ref), columns], k_s, loaded)
        plgpu.copy_gmem_to_smem(states_ref.at[row, head, chunk, columns, :], state_s, states_loaded)
        plgpu.copy_gmem_to_smem(d_states_ref.at[row, head, chunk, columns, :], d_state_s, states_loaded)
        of_documents = None if documents_ref is None else documents_ref.at[row, chunk]
        pairs.put_gates(pairs.load(gates_ref.at[row, tokens, head, columns]) * LOG2E, gates_s)
        plgpu.commit_smem()
        plgpu.barrier_wait(loaded)

        def multiply(a: Any, b: Any) -> jax.Array:
            def run(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, a, b)
                return acc[...]

            return pl.run_scoped(run, plgpu.ACC((CHUNK, CHUNK), jnp.float32))

        def decay(pattern: jax.Array) -> jax.Array:
            return jnp.exp2(pairs.sums(pattern, gates_s, hidden, left_gates))

        i, j = pairs.rows_and_columns()
        zero = jnp.float32(0)
        d_scores = jnp.where(i >= j, multiply(d_out_s, v_s.T), multiply(v_s, d_out_s.T)) * scale
        own = jnp.sum(jnp.where(i == j, d_scores, zero), axis=1)
        if of_documents is not None:
            d_scores = jnp.where(pairs.in_document(of_documents), d_scores, zero)
        d_scores = d_scores.astype(dtype)

        def add_level(level: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, d_sums = sums
            upper = pairs.is_upper(level)
            e = decay(pairs.gates_of_level(level, before))
            x = jnp.where(upper, pairs.load(q_s), pairs.load(k_s)) * e
            plgpu.commit_smem()  # all warps are done with the products of the level before
            decayed[...] = x.astype(dtype)
            plgpu.commit_smem()
            of_level = jnp.where(pairs.is_pair(level), d_scores, jnp.zeros((), dtype))

            def send(acc: Any) -> jax.Array:
                pairs.product(acc, of_level, decayed, left)
                return acc[...]

            y = pl.run_scoped(send, plgpu.ACC((CHUNK, COLUMNS), jnp.float32))
            # products with 0 and 1 join the sums, selections would not
            queries = jnp.where(upper, jnp.float32(1), zero)
            d_sums = d_sums + (pairs.load(decayed) * (2 * queries - 1)) * y
            y = e * y
            return dq + queries * y, dk + (1 - queries) * y, d_sums

        nothing = plgpu.layout_cast(jnp.zeros((CHUNK, COLUMNS), jnp.float32), pairs.WGMMA)
        dq, dk, d_sums = lax.fori_loop(0, LEVELS, add_level, (nothing, nothing, nothing))

        # from here on each array is used up before the next comes: registers are short
        plgpu.barrier_wait(states_loaded)
        factor = pairs.down(own)
        if bonus_ref is not None:
            factor = factor * pairs.along(pairs.load_columns(bonus_ref.at[head, columns]))
            d_bonus = pairs.down(own) * pairs.load(q_s) * pairs.load(k_s)
            d_bonus_ref[row, head, chunk, columns] = jnp.sum(d_bonus, axis=0)
        from_state = multiply(d_out_s, state_s.T) * decay(pairs.gates_of_query(WHOLE, before)) * scale
        if of_documents is not None:
            from_state = from_state * pairs.down(pairs.load_rows(of_documents.at[INTO]))
        dq, d_sums = dq + from_state, d_sums + pairs.load(q_s) * from_state
        of_own_token = pairs.load(q_s) * dq if before else None
        plgpu.commit_smem()
        decayed[...] = (dq + factor * pairs.load(k_s)).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(decayed, dq_ref.at[row, tokens, head, columns])

        into_state = multiply(v_s, d_state_s.T) * decay(pairs.gates_of_key(WHOLE))
        if of_documents is not None:
            into_state = into_state * pairs.down(pairs.load_rows(of_documents.at[OUT_OF]))
        written = pairs.load(k_s) * into_state
        plgpu.commit_smem()
        k_s[...] = (dk + into_state + factor * pairs.load(q_s)).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_s, dk_ref.at[row, tokens, head, columns])

        overlap = []
        for start in range(0, value_dim, COLUMNS):
            half = pl.ds(start, COLUMNS)
            overlap.append(jnp.sum(pairs.load(state_s.at[:, half]) * pairs.load(d_state_s.at[:, half]), axis=1))
        overlap_s[...] = functools.reduce(jnp.add, overlap)  # from a number of each row to one of each column
        sums = lambda pattern, half: pairs.sums(pattern, half, hidden, left_halves)  # noqa: E731
        high, low = (v_s.at[:, :COLUMNS], d_out_s.at[:, :COLUMNS]) if shares else own_halves
        pairs.put_halves(d_sums, high, low)
        d_gates = sums(j >= i, high) + sums(j >= i, low)
        pairs.put_halves(written, high, low)
        d_gates = d_gates + sums(j < i, high) + sums(j < i, low)
        kept = pairs.load_columns(keep_ref.at[row, head, chunk, columns]) * pairs.load_columns(overlap_s)
        d_gates = d_gates + pairs.along(kept)
        d_gates_ref[row, tokens, head, columns] = d_gates if of_own_token is None else d_gates - of_own_token
        plgpu.wait_smem_to_gmem(0)

    shape = jax.ShapeDtypeStruct
    tile = lambda columns, of=dtype: plgpu.SMEM((CHUNK, columns), of)  # noqa: E731
    of_tokens = (batch, length, heads, key_dim)
    return plgpu.kernel(
        kernel,
        out_type=(
            shape(of_tokens, dtype),
            shape(of_tokens, dtype),
            shape(of_tokens, jnp.float32),
            shape((batch, heads, chunks, key_dim), jnp.float32) if before else None,
        ),
        grid=(key_dim // COLUMNS, chunks, heads, batch),
        grid_names=("part", "chunk", "head", "row"),
        scratch_types=(
            tile(COLUMNS),
            tile(COLUMNS),
            tile(value_dim),
            tile(value_dim),
            tile(value_dim),
            tile(value_dim),
            tile(COLUMNS, GATES),
            None if shares else (tile(COLUMNS, HALVES), tile(COLUMNS, HALVES)),
            tile(COLUMNS),
            plgpu.SMEM((COLUMNS,), jnp.float32),
            tile(CHUNK, GATES) if interpret else None,
            tile(CHUNK, HALVES) if interpret else None,
            tile(CHUNK) if interpret else None,
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(q, k, v, log_decay, bonus, documents, d_out, states, d_states, keep, jnp.zeros(1))
