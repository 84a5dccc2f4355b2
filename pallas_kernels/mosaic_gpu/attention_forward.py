"""Softmax attention on Hopper GPUs, the forward pass: tiles of keys with a running maximum.

    o_i = sum_j e^{s_ij} v_j / (e^z + sum_j e^{s_ij})        L_i = ln(e^z + sum_j e^{s_ij})

Floors at B4 T8192 H16 K = V = 128, causal: q, k, v and o once are 0.54 GB, 0.13 ms at the 4.25 TB/s of an H200; the two
products are 1.1 TFLOP, 1.39 ms at 790 TFLOP/s. So the tensor cores must never wait for the exponentials, of which there
are half as many cycles.

Schedule. A block of threads has 128 queries of one head, 192 where D = 64; of the keys it visits only the tiles its
queries may read.
  memory warpgroup   TMA copies: q once, then k and v tile by tile, `stages` deep, each slot freed by its last product.
  two warpgroups     or three, 64 queries each, everything else in registers: o [64, V], the scores of a tile, the
                     maximum and the sum per row. The weights go to their product with v as the operand in registers.
Both orders of work keep the tensor cores busy with one warpgroup while the other makes exponentials:
  overlap            the scores of tile n are issued together with the weights of tile n - 1 times v; the maximum and
                     the exponentials of tile n run under the second product. The warpgroups issue in turns.
  otherwise          scores, exponentials, product with v, one after the other; two warpgroups are half a tile apart.
Keys go from the last tile to the first: what `overlap` does before its loop is for the diagonal, to be masked anyway.
Masks are made only for tiles on an edge of the band or of a document, and where the window is wide for one bound of it,
in two instructions a score; 128 queries and a window of 1024 make 9 tiles, 7 of them without a mask. Exponents are to
base 2, ln 2 folded into the scale; m stays scaled, so that an exponent is one fused multiply-add. Blocks with the
longest rows start first.

Measured: see `attention`. Masks with one comparison a score, of what belongs to rows and to columns, took a masked tile
from 580 instructions to 480 (full ones: 330), and a window of 1024 on an H200 from 0.622 ms to 0.580.

Dao et al. 2022, arXiv:2205.14135; Shah et al. 2024, arXiv:2407.08608 (warpgroups in turns, overlap within one).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.attention_mask import WGMMA, Band, edges, in_documents, key_tiles, mask

ROWS = 64  # queries of a warpgroup
REGISTERS, MEMORY_REGISTERS = {2: 232, 3: 160}, {2: 40, 3: 32}  # a thread, by warpgroups
LOWEST = -1e30  # a finite maximum of nothing: e^{-inf - m} is 0
LOG2E = math.log2(math.e)


class Tiles(NamedTuple):
    keys: int  # of a tile
    stages: int = 2  # tiles in flight
    overlap: bool = True  # see above
    warpgroups: int = 2  # of 64 queries each; 3 leave each thread 160 registers


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    query_ids: jax.Array | None,
    key_ids: jax.Array | None,
    *,
    band: Band,
    scale: float,
    cap: float | None,
    tiles: Tiles,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Out [B, T, H, D] in q's dtype, and log2(e) L [B, H, T] in float32; 0 and -inf in a row that may read no key.

    Args:
      q: [B, T, H, D], k, v: [B, M, G, D]; T is a multiple of 64, M of `tiles.keys`, D of 64.
      sinks: [B, H], float32. query_ids: [B, T], key_ids: [B, M]: documents; other padding on either side.
      interpret: of `pallas_call`; then products take their left side from shared memory, one at a time.
    """
    batch, length, heads, dim = q.shape
    groups, tile, wgs = k.shape[2], tiles.keys, tiles.warpgroups
    rows = ROWS * wgs  # queries of a block
    blocks, stages, dtype = -(-length // rows), min(tiles.stages, k.shape[1] // tile), q.dtype
    rate = LOG2E * (scale if cap is None else cap)
    below, above = (band, band) if query_ids is not None else edges(band, rows, tile)
    spans = None
    if query_ids is not None and key_ids is not None:
        starts = rows * jnp.arange(blocks, dtype=jnp.int32)
        cut = lambda ids, size: ids.reshape(batch, -1, size)  # noqa: E731
        filled = jnp.pad(query_ids, ((0, 0), (0, blocks * rows - length)), constant_values=-1)
        spans = in_documents(key_tiles(band, starts, rows, tile), cut(filled, rows), cut(key_ids, tile))
    column = lambda x, shape: lax.broadcast_in_dim(x, shape, [0])  # noqa: E731
    rows_of = lambda x, value: plgpu.layout_cast(jnp.full(x, value, jnp.float32), WGMMA.reduce(1))  # noqa: E731

    def attention_forward(
        q_ref: Any,
        k_ref: Any,
        v_ref: Any,
        sinks_ref: Any,
        query_ids_ref: Any,
        key_ids_ref: Any,
        spans_ref: Any,
        out_ref: Any,
        lse_ref: Any,
        *,
        q_s: Any,
        k_s: Any,
        v_s: Any,
        ids_s: Any,
        weights_s: Any,
        q_ready: Any,
        k_ready: Any,
        v_ready: Any,
        k_free: Any,
        v_free: Any,
        turn: Any,
    ) -> None:
        row, head, wg = (lax.axis_index(name) for name in ("row", "head", "wg"))
        block = blocks - 1 - lax.axis_index("block")
        if spans_ref is None:
            low, full_low, full_high, high = key_tiles(band, block * rows, rows, tile)
        else:
            low, full_low, full_high, high = (spans_ref[row, block, i] for i in range(4))
        count = high - low
        tile_of = lambda t: high - 1 - t  # noqa: E731
        slot_of = lambda t: lax.rem(t, jnp.int32(stages))  # noqa: E731

        # a warpgroup after the last row works on a copy of it and stores nothing
        within = lambda first: jnp.minimum(first, length - ROWS)  # noqa: E731

        @pl.when(wg == wgs)
        def _load() -> None:
            plgpu.set_max_registers(MEMORY_REGISTERS[wgs], action="decrease")
            group = lax.div(head, jnp.int32(heads // groups))
            for i in range(wgs):
                some = pl.ds(within(block * rows + i * ROWS), ROWS)
                plgpu.copy_gmem_to_smem(q_ref.at[row, some, head], q_s.at[pl.ds(i * ROWS, ROWS)], q_ready)

            def load(t: jax.Array, _: None) -> None:
                slot, keys = slot_of(t), pl.ds(tile_of(t) * tile, tile)
                pl.when(t >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                plgpu.copy_gmem_to_smem(k_ref.at[row, keys, group], k_s.at[slot], k_ready.at[slot])
                if ids_s is not None:
                    plgpu.copy_gmem_to_smem(key_ids_ref.at[row, keys], ids_s.at[slot], k_ready.at[slot])
                pl.when(t >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                plgpu.copy_gmem_to_smem(v_ref.at[row, keys, group], v_s.at[slot], v_ready.at[slot])

            def drain(t: jax.Array, _: None) -> None:
                plgpu.barrier_wait(k_free.at[slot_of(t)])
                plgpu.barrier_wait(v_free.at[slot_of(t)])

            lax.fori_loop(0, count, load, None)
            lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, None)

        @pl.when(wg < wgs)
        def _compute() -> None:
            plgpu.set_max_registers(REGISTERS[wgs], action="increase")
            mine, first = pl.ds(wg * ROWS, ROWS), block * rows + wg * ROWS
            here = (row, pl.ds(within(first), ROWS))
            ids = None
            if query_ids_ref is not None:
                ids = plgpu.load(query_ids_ref.at[here], layout=WGMMA.reduce(1), optimized=False)

            def softmax(
                s: jax.Array, t: Any, top: jax.Array, total: jax.Array, masked: Band | None
            ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
                """Weights of tile t; the new maximum and sum; what the old sums shrink by. Frees the slot of k."""
                if cap is not None:
                    s = jnp.tanh(s * (scale / cap))
                if masked is not None:
                    pair = None
                    if ids is not None:
                        theirs = plgpu.load(ids_s.at[slot_of(t)], layout=WGMMA.reduce(0), optimized=False)
                        pair = ids, theirs
                    visible = mask(masked, (ROWS, tile), first, tile_of(t) * tile, tile, pair)
                    s = s if visible is None else jnp.where(visible, s, -jnp.inf)
                    if ids is not None:
                        plgpu.commit_smem()  # ends the loads of ids, which ptxas may else move below
                plgpu.barrier_arrive(k_free.at[slot_of(t)])
                new_top = jnp.maximum(top, jnp.max(s, axis=1) * rate)
                weights = jnp.exp2(s * rate - column(new_top, s.shape))
                shrink = jnp.exp2(top - new_top)
                return weights, new_top, total * shrink + jnp.sum(weights, axis=1), shrink

            def scores(t: Any, under: Any = lambda: None) -> jax.Array:
                def run(acc: Any) -> jax.Array:
                    plgpu.wgmma(acc, q_s.at[mine], k_s.at[slot_of(t)].T)
                    under()
                    return acc[...]

                return pl.run_scoped(run, plgpu.ACC((ROWS, tile), jnp.float32))

            def add(acc: jax.Array, weights: jax.Array, t: Any) -> jax.Array:
                """acc + weights v, of tile t; frees its slot of v."""
                plgpu.barrier_wait(v_ready.at[slot_of(t)])
                if interpret:
                    weights_s[mine, :] = weights
                    plgpu.commit_smem()

                    def run(part: Any) -> jax.Array:
                        plgpu.wgmma(part, weights_s.at[mine], v_s.at[slot_of(t)])
                        return part[...]

                    acc = acc + pl.run_scoped(run, plgpu.ACC((ROWS, dim), jnp.float32))
                else:
                    product = lambda ref: plgpu.wgmma(ref, weights, v_s.at[slot_of(t)])  # noqa: E731
                    acc = pl.run_state(product)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[slot_of(t)])
                return acc

            def meet() -> None:
                if wgs != 2:
                    return
                plgpu.barrier_arrive(turn.at[0])
                plgpu.barrier_wait(turn.at[0])

            def one_by_one(t: Any, carry: Any, masked: Band | None) -> Any:
                acc, top, total = carry
                plgpu.barrier_wait(k_ready.at[slot_of(t)])
                s = scores(t, meet)
                weights, top, total, shrink = softmax(s, t, top, total, masked)
                acc = acc * column(shrink, acc.shape)
                acc, weights, top, total = lax.optimization_barrier((acc, weights.astype(dtype), top, total))
                meet()
                return add(acc, weights, t), top, total

            def await_keys(t: Any) -> None:
                pl.when(t < count)(lambda: plgpu.barrier_wait(k_ready.at[slot_of(t)]))

            def overlapped(t: Any, carry: Any, masked: Band | None) -> Any:
                acc, weights, top, total = carry
                before = t - 1
                new: Any
                if interpret:
                    plgpu.barrier_wait(k_ready.at[slot_of(t)])
                    s = scores(t)
                    new = softmax(s, t, top, total, masked)
                    acc = add(acc, weights, before)
                else:

                    def products(refs: Any) -> None:
                        s_ref, acc_ref, *state = refs
                        plgpu.barrier_wait(turn.at[wg])
                        plgpu.wgmma(s_ref, q_s.at[mine], k_s.at[slot_of(t)].T)
                        plgpu.barrier_wait(v_ready.at[slot_of(before)])
                        plgpu.wgmma(acc_ref, weights, v_s.at[slot_of(before)])
                        plgpu.barrier_arrive(turn.at[lax.rem(wg + 1, jnp.int32(wgs))])
                        s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                        for ref, x in zip(state, softmax(s, t, top, total, masked), strict=True):
                            ref[...] = x
                        # here, for it is a branch: without one ptxas waits for the product before the exponentials
                        await_keys(t + 1)

                    zeros = plgpu.layout_cast(jnp.zeros((ROWS, tile), jnp.float32), WGMMA)
                    _, acc, *new = pl.run_state(products)(
                        (plgpu.ACC.init(zeros), plgpu.ACC.init(acc), zeros, top, total, top)
                    )
                    plgpu.barrier_arrive(v_free.at[slot_of(before)])
                weights, top, total, shrink = new
                # 16 bits only now: registers that a product in flight reads must not be written
                acc, weights, shrink = lax.optimization_barrier((acc, weights, shrink))
                return acc * column(shrink, acc.shape), weights.astype(dtype), top, total

            acc = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), WGMMA)
            top, total = rows_of(ROWS, LOWEST), rows_of(ROWS, 0)
            if sinks_ref is not None:
                z = rows_of(ROWS, sinks_ref[row, head] * LOG2E)
                top, total = jnp.maximum(z, LOWEST), jnp.where(z > LOWEST, 1.0, 0.0)
            plgpu.barrier_wait(q_ready)
            carry: Any = (acc, top, total)
            step, start = one_by_one, 0
            if tiles.overlap:
                plgpu.barrier_wait(k_ready.at[slot_of(0)])
                weights, top, total, _ = softmax(scores(0), 0, top, total, band)
                carry, step, start = (acc, weights.astype(dtype), top, total), overlapped, 1
                if not interpret:
                    await_keys(1)
                    pl.when(wg == wgs - 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
            else:
                pl.when(wg == 1)(meet)
            begin = jnp.maximum(high - full_high, start)
            end = jnp.maximum(high - full_low, begin)
            if band.least is not None or band.keys % tile or ids is not None:
                carry = lax.fori_loop(start, begin, functools.partial(step, masked=above), carry)
            carry = lax.fori_loop(begin, end, functools.partial(step, masked=None), carry)
            if band.most is not None or ids is not None:
                carry = lax.fori_loop(end, count, functools.partial(step, masked=below), carry)
            if tiles.overlap:
                acc, weights, top, total = carry
                if not interpret:
                    pl.when(wg == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
                acc = add(acc, weights, count - 1)
            else:
                acc, top, total = carry
                pl.when(wg == 0)(meet)

            # l = 0 where no key was read: o = 0 and L = -inf; q has been read
            inverse = jnp.where(total > 0, 1 / total, 0)
            q_s[mine, :] = (acc * column(inverse, acc.shape)).astype(dtype)
            plgpu.commit_smem()

            def store() -> None:
                plgpu.copy_smem_to_gmem(q_s.at[mine], out_ref.at[(*here, head)])
                lse_ref[row, head, here[1]] = jnp.where(total > 0, top + jnp.log2(total), -jnp.inf)

            store() if length % rows == 0 else pl.when(first < length)(store)
            plgpu.wait_smem_to_gmem(0)

    smem = lambda *size: plgpu.SMEM(size, dtype)  # noqa: E731
    barriers = lambda arrivals, number=stages: plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)  # noqa: E731
    scratch: Any = {
        "q_s": smem(rows, dim),
        "k_s": smem(stages, tile, dim),
        "v_s": smem(stages, tile, dim),
        "ids_s": None if spans is None else plgpu.SMEM((stages, tile), jnp.int32),
        "weights_s": smem(rows, tile) if interpret else None,
        "q_ready": plgpu.Barrier(num_arrivals=wgs),
        "k_ready": barriers(1 if spans is None else 2),
        "v_ready": barriers(1),
        "k_free": barriers(wgs),
        "v_free": barriers(wgs),
        "turn": barriers(1, wgs) if tiles.overlap else barriers(2, 1),
    }
    return plgpu.kernel(
        attention_forward,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        grid=(batch, blocks, heads),
        grid_names=("row", "block", "head"),
        num_threads=wgs + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(q, k, v, sinks, query_ids, key_ids, spans)
