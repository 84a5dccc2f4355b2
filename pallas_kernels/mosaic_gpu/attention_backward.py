"""Softmax attention on Hopper GPUs, the backward pass: dq, dk and dv by one kernel over blocks of keys.

    P_ij = e^{s_ij - L_i}        D_i = do_i . o_i - dL_i        dS_ij = P_ij (do_i . v_j - D_i)
    dv_j = sum_i P_ij do_i       dk_j = scale sum_i dS_ij q_i   dq_i = scale sum_j dS_ij k_j

and with a soft cap c, where s = c t and t = tanh(scale q . k / c), dS is multiplied by 1 - t^2.

Floors at B4 T8192 H16 K = V = 128, causal: five products, 2.75 TFLOP, 3.5 ms at 790 TFLOP/s; q, k, v, o, do, dq, dk
and dv once are 1.1 GB, 0.25 ms. Two kernels, one over keys and one over queries for dq, would make seven products.

Schedule. A block of threads keeps 128 keys (64 for D = 256) of one key head and walks over the tiles of queries that
may read them, for every query head of the group in turn; all work is on transposed scores [keys, queries].
  memory warpgroup   TMA copies: k and v once, then q, do, L and D tile by tile.
  two warpgroups     64 keys each: dk and dv [64, columns] in registers to the end. Per tile: k q^T and v do^T; P, while
                     the latter is in flight; P do; dS meanwhile, to shared memory too; dS q, with P and dS as operands
                     in registers, and dq = dS^T k, of which each warpgroup makes half the columns from both halves of
                     dS. Not `in_registers`, dS q takes dS from shared memory.
  dq                 leaves shared memory through a TMA copy that adds, to float32 in memory. Tiles of many blocks add
                     to the same rows in any order, so dq may differ in its last bits from run to run.
dP starts from -D, so that dS is one multiplication. dS has one place: `ds_free` says that both have read the tile
before. It is awaited between the exponentials and dP, for without a branch there ptxas makes all exponentials after dP.
Shared memory whose place is known for the whole loop has a first axis of 1, indexed by a zero that is read from shared
memory once a tile: descriptors of constant places were all made before the loop, 300 bytes of them spilled.
Registers hold dk and dv of up to 128 columns; D = 256 makes them in two parts, each with its own scores.

Measured: see `attention`. The paragraph above and dS under P do with dS in registers took a full tile from 566
instructions to 470, a masked one from 639 to 549, the spills at D = 128 from 252 bytes to none, the exponentials under
dP from none to 31 of 32, and the backward pass on an H200 from 5.85 ms to 5.36.

Dao 2023, arXiv:2307.08691; Shah et al. 2024, arXiv:2407.08608.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.attention_mask import WGMMA, Band, edges, in_documents, mask, query_tiles

ROWS = 64  # keys of a warpgroup
LOG2E = math.log2(math.e)


class BackwardTiles(NamedTuple):
    queries: int  # of a tile
    stages: int = 2  # tiles in flight
    warpgroups: int = 2  # of 64 keys each
    parts: int = 1  # of the columns of dq, dk and dv
    in_registers: bool = True  # dS as an operand of dk; else it is read from shared memory


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    query_ids: jax.Array | None,
    key_ids: jax.Array | None,
    *,
    band: Band,
    scale: float,
    cap: float | None,
    tiles: BackwardTiles,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq [B, T, H, D], dk and dv [B, M, G, D] in the dtype of q, k and v.

    Args:
      q, d_out: [B, T, H, D], k, v: [B, M, G, D]; T is a multiple of `tiles.queries`, M of 64 for each warpgroup, D of
        32 for each warpgroup of each part.
      lse: [B, H, T], log2(e) L, and inf in a row that reads no key. delta: [B, H, T], D. Both float32.
      query_ids: [B, T], key_ids: [B, M]: documents; other padding on either side.
      interpret: of `pallas_call`; then products take their left side from shared memory, one at a time, and each block
        has a dq of its own.
    """
    batch, length, heads, dim = q.shape
    keys, groups, tile, wgs = k.shape[1], k.shape[2], tiles.queries, tiles.warpgroups
    block_keys, group = ROWS * wgs, heads // groups
    blocks, stages, dtype = keys // block_keys, min(tiles.stages, length // tile), q.dtype
    part_dim = dim // tiles.parts
    own_dim = part_dim // wgs  # columns of dq of a warpgroup
    width = min(own_dim, 64)  # of a product for dq: more would not fit into the registers
    cuts = own_dim // width
    rate = LOG2E * (scale if cap is None else cap)
    above, below = (band, band) if query_ids is not None else edges(band, block_keys, tile)
    spans = None
    if query_ids is not None and key_ids is not None:
        starts = block_keys * jnp.arange(blocks, dtype=jnp.int32)
        cut = lambda ids, size: ids.reshape(batch, -1, size)  # noqa: E731
        span = query_tiles(band, starts, block_keys, tile, length)
        spans = in_documents(span, cut(key_ids, block_keys), cut(query_ids, tile))
    across = lambda x, shape: lax.broadcast_in_dim(x, shape, [1])  # noqa: E731
    zeros = lambda *shape: plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)  # noqa: E731

    def attention_backward(
        *refs: Any,
        k_s: Any,
        v_s: Any,
        q_s: Any,
        d_out_s: Any,
        lse_s: Any,
        delta_s: Any,
        ids_s: Any,
        ds_s: Any,
        weights_s: Any,
        dq_s: Any,
        out_s: Any,
        kv_ready: Any,
        q_ready: Any,
        d_out_ready: Any,
        free: Any,
        zero_s: Any,
        ds_free: Any,
        ds_ready: Any,
    ) -> None:
        q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, query_ids_ref, key_ids_ref, spans_ref, *out_refs = refs
        dq_ref, dk_ref, dv_ref = out_refs
        row, head_part, block, wg = (lax.axis_index(name) for name in ("row", "head", "block", "wg"))
        kv_head, part = lax.div(head_part, jnp.int32(tiles.parts)), lax.rem(head_part, jnp.int32(tiles.parts))
        columns = pl.ds(part * part_dim, part_dim)
        if spans_ref is None:
            low, full_low, full_high, high = query_tiles(band, block * block_keys, block_keys, tile, length)
        else:
            low, full_low, full_high, high = (spans_ref[row, block, i] for i in range(4))
        each = high - low  # tiles of a head
        keys_here = pl.ds(block * block_keys, block_keys)

        @pl.when(wg == wgs)
        def _load() -> None:
            plgpu.set_max_registers(24, action="decrease")
            plgpu.copy_gmem_to_smem(k_ref.at[row, keys_here, kv_head], k_s.at[0], kv_ready)
            plgpu.copy_gmem_to_smem(v_ref.at[row, keys_here, kv_head], v_s.at[0], kv_ready)

            def load(step: jax.Array, _: None) -> None:
                slot = lax.rem(step, jnp.int32(stages))
                head = kv_head * group + lax.div(step, each)
                queries = pl.ds((low + lax.rem(step, each)) * tile, tile)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_s.at[slot], q_ready.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[row, head, queries], lse_s.at[slot], q_ready.at[slot])
                if ids_s is not None:
                    plgpu.copy_gmem_to_smem(query_ids_ref.at[row, queries], ids_s.at[slot], q_ready.at[slot])
                plgpu.copy_gmem_to_smem(d_out_ref.at[row, queries, head], d_out_s.at[slot], d_out_ready.at[slot])
                plgpu.copy_gmem_to_smem(delta_ref.at[row, head, queries], delta_s.at[slot], d_out_ready.at[slot])

            def drain(step: jax.Array, _: None) -> None:
                plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(stages))])

            steps = group * each
            lax.fori_loop(0, steps, load, None)
            lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, None)

        @pl.when(wg < wgs)
        def _compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            mine, first_key = pl.ds(wg * ROWS, ROWS), block * block_keys + wg * ROWS
            own = [pl.ds(part * part_dim + wg * own_dim + width * i, width) for i in range(cuts)]
            ids = None
            if key_ids_ref is not None:
                ids = plgpu.load(key_ids_ref.at[row, pl.ds(first_key, ROWS)], layout=WGMMA.reduce(1), optimized=False)

            def product(a: Any, b: Any) -> jax.Array:
                def run(acc: Any) -> jax.Array:
                    plgpu.wgmma(acc, a, b)
                    return acc[...]

                return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))

            def weights_of(s: jax.Array, n: Any, slot: Any, masked: Band | None) -> tuple[jax.Array, jax.Array]:
                """P^T, and t where there is a cap."""
                t = s if cap is None else jnp.tanh(s * (scale / cap))
                lse = plgpu.load(lse_s.at[slot], layout=WGMMA.reduce(0), optimized=False)
                exponent = t * rate - across(lse, s.shape)
                if masked is not None:
                    pair = None
                    if ids is not None:
                        pair = plgpu.load(ids_s.at[slot], layout=WGMMA.reduce(0), optimized=False), ids
                    visible = mask(masked, (ROWS, tile), n * tile, first_key, block_keys, pair, queries=1)
                    exponent = exponent if visible is None else jnp.where(visible, exponent, -jnp.inf)
                return jnp.exp2(exponent), t

            def put_ds(weights: jax.Array, t: Any, dp: jax.Array, zero: Any) -> jax.Array:
                """dS^T, of which the other warpgroup reads a half: it must meet `ds_ready` first."""
                ds = weights * dp
                if cap is not None:
                    ds = ds * (1 - t * t)
                ds = ds.astype(dtype)
                ds_s[zero, mine, :] = ds
                plgpu.commit_smem()
                plgpu.barrier_arrive(ds_ready)
                return ds

            def put_dq(dq: jax.Array, n: Any, head: Any, cut: int) -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq_s[wg] = dq
                plgpu.commit_smem()
                there = dq_ref.at[block if interpret else 0, row, pl.ds(n * tile, tile), head, own[cut]]
                plgpu.copy_smem_to_gmem(dq_s.at[wg], there, reduction_op=None if interpret else "add")

            def one_by_one(n: Any, slot: Any, zero: Any, head: Any, sums: Any, masked: Band | None) -> Any:
                dk, dv = sums
                s = product(k_s.at[zero, mine], q_s.at[slot].T)
                dp = product(v_s.at[zero, mine], d_out_s.at[slot].T)
                delta = plgpu.load(delta_s.at[slot], layout=WGMMA.reduce(0), optimized=False)
                dp = dp - across(delta, dp.shape)
                weights, t = weights_of(s, n, slot, masked)
                weights_s[mine, :] = weights.astype(dtype)
                plgpu.barrier_wait(ds_free)
                put_ds(weights, t, dp, zero)
                plgpu.barrier_wait(ds_ready)
                dv = dv + product(weights_s.at[mine], d_out_s.at[slot, :, columns])
                dk = dk + product(ds_s.at[zero, mine], q_s.at[slot, :, columns])
                for cut in range(cuts):
                    put_dq(product(ds_s.at[zero].T, k_s.at[zero, :, own[cut]]), n, head, cut)
                plgpu.barrier_arrive(ds_free)
                return dk, dv

            def in_flight(n: Any, slot: Any, zero: Any, head: Any, sums: Any, masked: Band | None) -> Any:
                dk, dv = sums

                def scores(refs: Any) -> None:
                    s_ref, dp_ref, weights_ref, t_ref = refs
                    plgpu.wgmma(s_ref, k_s.at[zero, mine], q_s.at[slot].T)
                    plgpu.wgmma(dp_ref, v_s.at[zero, mine], d_out_s.at[slot].T)
                    weights, t = weights_of(plgpu.wgmma_accumulator_load(s_ref, wait_n=1), n, slot, masked)
                    weights_ref[...] = weights
                    plgpu.barrier_wait(ds_free)  # a branch: without one ptxas waits for dP before the exponentials
                    if t_ref is not None:
                        t_ref[...] = t

                empty = zeros(ROWS, tile)
                t = None if cap is None else empty
                plgpu.barrier_wait(d_out_ready.at[slot])
                delta = plgpu.load(delta_s.at[slot], layout=WGMMA.reduce(0), optimized=False)
                less = across(-delta, empty.shape)
                _, dp, weights, t = pl.run_state(scores)((plgpu.ACC.init(empty), plgpu.ACC.init(less), empty, t))
                # 16 bits only now: registers that a product in flight reads must not be written
                dp, weights = lax.optimization_barrier((dp, weights))
                left = weights.astype(dtype)

                def add(refs: Any) -> None:
                    dk_sum, dv_sum = refs
                    plgpu.wgmma(dv_sum, left, d_out_s.at[slot, :, columns])
                    right = put_ds(weights, t, dp, zero)
                    plgpu.barrier_wait(ds_ready)

                    def multiply(dq_sum: Any, cut: int, is_last: bool) -> None:
                        plgpu.wgmma(dq_sum, ds_s.at[zero].T, k_s.at[zero, :, own[cut]])
                        if is_last:
                            ds = right if tiles.in_registers else ds_s.at[zero, mine]
                            plgpu.wgmma(dk_sum, ds, q_s.at[slot, :, columns])
                        dq = plgpu.wgmma_accumulator_load(dq_sum, wait_n=int(is_last))
                        if is_last and tiles.in_registers:
                            plgpu.barrier_arrive(ds_free)
                        put_dq(dq, n, head, cut)

                    for cut in range(cuts):
                        run = functools.partial(multiply, cut=cut, is_last=cut == cuts - 1)
                        pl.run_scoped(run, plgpu.ACC((tile, width), jnp.float32))

                sums = pl.run_state(add)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))
                if not tiles.in_registers:
                    plgpu.barrier_arrive(ds_free)
                return sums

            def step(n: Any, carry: Any, masked: Band | None, head: Any, before: Any) -> Any:
                at = before + n - low
                slot = lax.rem(at, jnp.int32(stages))
                zero = zero_s[wg, 0]
                plgpu.barrier_wait(q_ready.at[slot])
                if interpret:
                    plgpu.barrier_wait(d_out_ready.at[slot])
                carry = (one_by_one if interpret else in_flight)(n, slot, zero, head, carry, masked)
                plgpu.barrier_arrive(free.at[slot])
                return carry

            def of_head(index: Any, carry: Any) -> Any:
                run = functools.partial(step, head=kv_head * group + index, before=index * each)
                if band.least is not None or ids is not None:
                    carry = lax.fori_loop(low, full_low, functools.partial(run, masked=below), carry)
                carry = lax.fori_loop(full_low, full_high, functools.partial(run, masked=None), carry)
                if band.most is not None or band.keys % block_keys or ids is not None:
                    carry = lax.fori_loop(full_high, high, functools.partial(run, masked=above), carry)
                return carry

            plgpu.barrier_arrive(ds_free)
            zero_s[wg] = plgpu.layout_cast(jnp.zeros(128, jnp.int32), plgpu.Layout.WG_STRIDED((128,), 1))
            plgpu.commit_smem()
            plgpu.barrier_wait(kv_ready)
            dk, dv = lax.fori_loop(0, group, of_head, (zeros(ROWS, part_dim), zeros(ROWS, part_dim)))
            plgpu.barrier_wait(ds_free)  # k has been read for dq
            dk_s, dv_s = (k_s.at[0], v_s.at[0]) if out_s is None else (out_s.at[0], out_s.at[1])
            dk_s[mine, :] = (dk * scale).astype(dtype)
            dv_s[mine, :] = dv.astype(dtype)
            plgpu.commit_smem()
            for source, target in ((dk_s, dk_ref), (dv_s, dv_ref)):
                plgpu.copy_smem_to_gmem(source.at[mine], target.at[row, pl.ds(first_key, ROWS), kv_head, columns])
            plgpu.wait_smem_to_gmem(0)

    smem = lambda *size: plgpu.SMEM(size, dtype)  # noqa: E731
    vector = lambda kind: plgpu.SMEM((stages, tile), kind)  # noqa: E731
    barriers = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)  # noqa: E731
    scratch: Any = {
        "k_s": smem(1, block_keys, dim),
        "v_s": smem(1, block_keys, dim),
        "q_s": smem(stages, tile, dim),
        "d_out_s": smem(stages, tile, dim),
        "lse_s": vector(jnp.float32),
        "delta_s": vector(jnp.float32),
        "ids_s": None if spans is None else vector(jnp.int32),
        "ds_s": smem(1, block_keys, tile),
        "weights_s": smem(block_keys, tile) if interpret else None,
        "dq_s": plgpu.SMEM((wgs, tile, width), jnp.float32),
        "out_s": smem(2, block_keys, part_dim) if tiles.parts > 1 else None,
        "kv_ready": plgpu.Barrier(num_arrivals=2),
        "q_ready": barriers(2 if spans is None else 3),
        "d_out_ready": barriers(2),
        "free": barriers(wgs),
        "zero_s": plgpu.SMEM((wgs, 128), jnp.int32),
        "ds_free": plgpu.Barrier(num_arrivals=wgs),
        "ds_ready": plgpu.Barrier(num_arrivals=wgs),
    }
    sums = jax.new_ref(jnp.zeros((blocks if interpret else 1, *q.shape), jnp.float32))
    dk, dv = plgpu.kernel(
        attention_backward,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        grid=(batch, blocks, groups * tiles.parts),
        grid_names=("row", "block", "head"),
        num_threads=wgs + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(q, k, v, d_out, lse, delta, query_ids, key_ids, spans, sums)
    return (jnp.sum(sums[...], 0) * scale).astype(q.dtype), dk, dv
