"""Gradients of scalar decay inside the chunks, made for all of them at once on Hopper GPUs.

With P_ij = scale (do_i . v_j) e^{G_i - G_j} for j <= i, the state S that enters a chunk and the gradient dS' of the one
that leaves it:

    dq = P K + scale diag(e^G) dO S^T          dk = P^T Q + diag(e^{G_C - G}) V dS'^T

and for the gates, from float32 results before they are rounded:

    after_i = q_i . dq_i - k_i . (P^T Q)_i          before_j = k_j . (dk_j of what dS' gives)          <S, dS'>

Floors, B4 T8192 H16 K = V = 128: q, k, v, do, dq and dk are 0.81 GB, the states of 64 tokens 0.54 GB: 0.32 ms at 4.25
TB/s; the products are 52 GFLOP, 0.07 ms at 790 TFLOP/s.

Schedule. A block is one warpgroup with one chunk of one head and 64 channels of K. Both P and P^T are made, from do v^T
and v do^T, by each of the K / 64 blocks, so that they are left sides in registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import pair_levels as pairs
from pallas_kernels.mosaic_gpu.pair_levels import CHUNK
from pallas_kernels.mosaic_gpu.scalar_scores import COLUMNS, NOTHING


def scalar_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sums: jax.Array,
    d_out: jax.Array,
    states: jax.Array,
    d_states: jax.Array,
    *,
    scale: float,
    gates: bool,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
    """dq and dk [B, T, H, K] in q's dtype; with `gates`, after and before [B, H, T] and <S, dS'> [B, H, N] in float32.

    Args: as those of `scalar_scores`, and
      v: [B, T, heads, V], d_out: [B, T, H, V].
      states, d_states: [B, H, N, K, V] in v's dtype: S and dS' of each chunk.
    """
    batch, length, _, key_dim = q.shape
    heads, chunks, dtype, value_dim = sums.shape[1], length // CHUNK, q.dtype, v.shape[-1]
    parts = key_dim // COLUMNS

    def kernel(
        q_ref: Any,
        k_ref: Any,
        v_ref: Any,
        sums_ref: Any,
        d_out_ref: Any,
        states_ref: Any,
        d_states_ref: Any,
        nothing_ref: Any,
        dq_ref: Any,
        dk_ref: Any,
        dots_ref: Any,
        overlap_ref: Any,
        q_s: Any,
        k_s: Any,
        v_s: Any,
        d_out_s: Any,
        state_s: Any,
        d_state_s: Any,
        left: Any,
        loaded: Any,
        states_loaded: Any,
    ) -> None:
        part, chunk = lax.axis_index("part"), lax.axis_index("chunk")
        head, row = lax.axis_index("head"), lax.axis_index("row")
        tokens, columns = pl.ds(chunk * CHUNK, CHUNK), pl.ds(part * COLUMNS, COLUMNS)
        served = lambda ref: lax.div(head, jnp.int32(heads // ref.shape[2]))  # noqa: E731
        plgpu.copy_gmem_to_smem(v_ref.at[row, tokens, served(v_ref), :], v_s, loaded)
        plgpu.copy_gmem_to_smem(d_out_ref.at[row, tokens, head, :], d_out_s, loaded)
        plgpu.copy_gmem_to_smem(q_ref.at[row, tokens, served(q_ref), columns], q_s, loaded)
        plgpu.copy_gmem_to_smem(k_ref.at[row, tokens, served(k_ref), columns], k_s, loaded)
        plgpu.copy_gmem_to_smem(states_ref.at[row, head, chunk, columns, :], state_s, states_loaded)
        plgpu.copy_gmem_to_smem(d_states_ref.at[row, head, chunk, columns, :], d_state_s, states_loaded)
        of_chunk = sums_ref.at[row, head, chunk]
        total, nothing = sums_ref[row, head, chunk, CHUNK - 1], nothing_ref[0]
        of_rows = pairs.load_rows(of_chunk)
        i, j = pairs.rows_and_columns()
        exponent = pairs.down(of_rows) - pairs.along(pairs.load_columns(of_chunk))
        read, write = jnp.exp2(of_rows) * scale, jnp.exp2(total - of_rows)
        plgpu.barrier_wait(loaded)

        def multiply(a: Any, b: Any) -> jax.Array:
            def run(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, a, b)
                return acc[...]

            return pl.run_scoped(run, plgpu.ACC((CHUNK, CHUNK), jnp.float32))

        def send(scores: jax.Array, right: Any) -> jax.Array:
            def run(acc: Any) -> jax.Array:
                pairs.product(acc, scores.astype(dtype), right, left)
                return acc[...]

            return pl.run_scoped(run, plgpu.ACC((CHUNK, COLUMNS), jnp.float32))

        # `nothing` comes from memory, so that the compiler knows no register of a left side (see pair_levels.sums)
        p = multiply(d_out_s, v_s.T) * jnp.exp2(jnp.where(j <= i, exponent, nothing)) * scale
        dq = send(p, k_s)
        p = multiply(v_s, d_out_s.T) * jnp.exp2(jnp.where(j >= i, -exponent, nothing)) * scale
        dk = send(p, q_s)
        dot = lambda x, y: jnp.sum(pairs.load(x) * y, axis=1)  # noqa: E731
        from_pairs = dot(k_s, dk) if gates else jnp.float32(0)
        plgpu.barrier_wait(states_loaded)
        dq = dq + multiply(d_out_s, state_s.T) * pairs.down(read)
        into_state = multiply(v_s, d_state_s.T) * pairs.down(write)
        if gates:
            dots_ref[part, 0, row, head, tokens] = dot(q_s, dq) - from_pairs
            dots_ref[part, 1, row, head, tokens] = dot(k_s, into_state)
            overlap = []
            for start in range(0, value_dim, COLUMNS):
                some = pl.ds(start, COLUMNS)
                overlap.append(dot(state_s.at[:, some], pairs.load(d_state_s.at[:, some])))
            overlap_ref[row, head, chunk, columns] = functools.reduce(jnp.add, overlap)
        plgpu.commit_smem()
        q_s[...] = dq.astype(dtype)
        k_s[...] = (dk + into_state).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, dq_ref.at[row, tokens, head, columns])
        plgpu.copy_smem_to_gmem(k_s, dk_ref.at[row, tokens, head, columns])
        plgpu.wait_smem_to_gmem(0)

    shape = jax.ShapeDtypeStruct
    tile = lambda columns: plgpu.SMEM((CHUNK, columns), dtype)  # noqa: E731
    dq, dk, dots, overlap = plgpu.kernel(
        kernel,
        out_type=(
            shape((batch, length, heads, key_dim), dtype),
            shape((batch, length, heads, key_dim), dtype),
            shape((parts, 2, batch, heads, length), jnp.float32) if gates else None,
            shape((batch, heads, chunks, key_dim), jnp.float32) if gates else None,
        ),
        grid=(parts, chunks, heads, batch),
        grid_names=("part", "chunk", "head", "row"),
        scratch_types=(
            tile(COLUMNS),
            tile(COLUMNS),
            tile(value_dim),
            tile(value_dim),
            tile(value_dim),
            tile(value_dim),
            tile(CHUNK) if interpret else None,
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(q, k, v, sums, d_out, states, d_states, jnp.full(1, NOTHING))
    if not gates:
        return dq, dk, None, None, None
    after, before = jnp.sum(dots, 0)
    return dq, dk, after, before, jnp.sum(overlap, -1)
