"""Softmax attention over tiles of keys with a running maximum: memory linear in T, forward and backward.

Online softmax (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691). A block of queries visits the tiles of
keys in its band; per row, for each tile

    m' = max(m, max_j s_j)    l' = e^{m-m'} l + sum_j e^{s_j-m'}    a' = e^{m-m'} a + sum_j e^{s_j-m'} v_j

and o = a / l, L = m + ln l. A sink logit z starts the sums: m = z, l = 1. The backward pass keeps o and L only:

    P = e^{S-L}    D_i = dO_i . O_i - dL_i    dS = P * (dO V^T - D)    dz = -sum_i e^{z-L_i} D_i
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.precision import accumulation_dtype, contract, zeros_varying
from effattn_jax.sparse.mask import Band, same_document
from effattn_jax.typing import Array, Bool, Float, Int

ONE_TILE = 2048  # the band of a window up to so many keys is one tile


class Plan(NamedTuple):
    """What is known at trace time."""

    band: Band
    scale: float
    logits_soft_cap: float | None
    tile: int
    once: bool  # every band fits into one tile


class Block(NamedTuple):
    """C consecutive queries; R query heads share each of G key heads."""

    q: Float[Array, "B G C R K"]
    segments: Int[Array, "B C"] | None
    first: Int[Array, ""]  # position of the first query


def flash(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    *,
    offset: int | Int[Array, ""],
    causal: bool,
    window: int | None,
    sinks: Float[Array, " H"] | None,
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B M"] | None,
    scale: float,
    logits_soft_cap: float | None,
    return_lse: bool,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Out and log-sum-exp of queries at positions offset, offset + 1, ... over keys at positions 0, 1, ..."""
    batch, length, heads, key_dim = q.shape
    groups = k.shape[2]
    block = _block(k.shape[1], window)
    blocks = -(-length // block)
    size = -(-length // blocks)

    # one set of varying mesh axes for all: outside of `shard_map` the zero is none
    given = [x for x in (q, k, v, sinks, query_segments, key_segments, jnp.asarray(offset)) if x is not None]
    zero = zeros_varying((), jnp.float32, *given)
    q, k, v = (x + zero.astype(x.dtype) for x in (q, k, v))
    if sinks is not None:
        sinks = sinks.astype(accumulation_dtype(q.dtype)).reshape(groups, heads // groups) + zero

    def to_blocks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, blocks * size - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, blocks, size, *x.shape[2:]), 1, 0)

    def from_blocks(x: Array) -> Array:  # [N, B, G, C, R, ...] -> [B, T, H, ...]
        x = jnp.moveaxis(jnp.moveaxis(x, 0, 1), 2, 3)
        return x.reshape(batch, blocks * size, heads, *x.shape[5:])[:, :length]

    band = Band(causal, window)
    width = band.width(size, k.shape[1])
    once = width <= (block if window is None else ONE_TILE)
    plan = Plan(band, scale, logits_soft_cap, width if once else min(block, k.shape[1]), once)
    queries = Block(
        jnp.moveaxis(to_blocks(q).reshape(blocks, batch, size, groups, heads // groups, key_dim), 2, 3),
        None if query_segments is None else to_blocks(query_segments),
        offset + size * jnp.arange(blocks),
    )
    out, lse = _attend(plan, queries, k, v, sinks, key_segments)
    return from_blocks(out), from_blocks(lse)


def _block(keys: int, window: int | None) -> int:
    """Queries of a block: small enough that few tiles are half masked, large enough that there are few."""
    return min(512, max(128, keys // 4) if window is None else max(64, window))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: Plan,
    queries: Block,  # N blocks, stacked
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    sinks: Float[Array, "G R"] | None,
    segments: Int[Array, "B M"] | None,
) -> tuple[Float[Array, "N B G C R V"], Float[Array, "N B G C R"]]:
    def step(_: None, block: Block) -> tuple[None, tuple[Array, Array]]:
        return None, _forward(plan, block, k, v, sinks, segments)

    return jax.lax.scan(step, None, queries)[1]


def _forward(
    plan: Plan, block: Block, k: Array, v: Array, sinks: Array | None, segments: Array | None
) -> tuple[Float[Array, "B G C R V"], Float[Array, "B G C R"]]:
    def visit(low: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, weighted = carry
        tile = _Tile(plan, low, k, v, segments)
        s, _ = _logits(plan, block, tile)
        new_top = jnp.maximum(top, jnp.max(s, axis=-1))
        p = jnp.exp(s - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        total = shrink * total + jnp.sum(p, axis=-1)
        weighted = shrink[..., None] * weighted + contract("bgcrj,bjgv->bgcrv", p.astype(v.dtype), tile.v)
        return new_top, total, weighted

    accumulate = accumulation_dtype(block.q.dtype)
    rows = block.q.shape[:-1]
    # a finite floor: e^{s - m} is 0, not NaN, while a row has met no key
    top = jnp.full_like(block.q, jnp.finfo(accumulate).min / 2, shape=rows, dtype=accumulate)
    total = jnp.zeros_like(block.q, shape=rows, dtype=accumulate)
    if sinks is not None:
        top = jnp.maximum(top, sinks[:, None])
        total = jnp.exp(sinks[:, None] - top)
    weighted = jnp.zeros_like(block.q, shape=(*rows, v.shape[-1]), dtype=accumulate)
    top, total, weighted = _visit_tiles(plan, block, k.shape[1], visit, (top, total, weighted))

    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = (weighted / total[..., None]).astype(block.q.dtype)
    return out, jnp.where(empty, -jnp.inf, top + jnp.log(total))


def _attend_forward(plan: Plan, queries: Block, k: Array, v: Array, sinks: Array | None, segments: Array | None) -> Any:
    out, lse = _attend(plan, queries, k, v, sinks, segments)
    return (out, lse), (queries, k, v, sinks, segments, out, lse)


def _attend_backward(plan: Plan, kept: Any, cotangents: tuple[Array, Array]) -> Any:
    queries, k, v, sinks, segments, out, lse = kept
    accumulate = accumulation_dtype(queries.q.dtype)

    def step(carry: tuple[Array, ...], inputs: tuple[Block, Array, Array, Array, Array]) -> Any:
        dk, dv, dsinks = carry
        block, out, lse, dout, dlse = inputs
        empty = jnp.isneginf(lse)
        lse = jnp.where(empty, jnp.inf, lse)  # e^{s - L} is 0 in a row without keys
        d = jnp.sum(dout.astype(accumulate) * out.astype(accumulate), axis=-1) - jnp.where(empty, 0, dlse)
        dq, dk, dv = _backward(plan, block, k, v, segments, lse, dout, d, dk, dv)
        if sinks is not None:
            dsinks -= jnp.sum(jnp.exp(sinks[:, None] - lse) * d, axis=(0, 2))
        return (dk, dv, dsinks), dq.astype(block.q.dtype)

    zeros = [jnp.zeros_like(x, dtype=accumulate) for x in (k, v, k[0, 0] if sinks is None else sinks)]
    (dk, dv, dsinks), dq = jax.lax.scan(step, tuple(zeros), (queries, out, lse, *cotangents))
    none: Any = None  # positions and documents have no gradient
    return Block(dq, none, none), dk.astype(k.dtype), dv.astype(v.dtype), None if sinks is None else dsinks, none


_attend.defvjp(_attend_forward, _attend_backward)


def _backward(
    plan: Plan,
    block: Block,
    k: Array,
    v: Array,
    segments: Array | None,
    lse: Float[Array, "B G C R"],
    dout: Float[Array, "B G C R V"],
    d: Float[Array, "B G C R"],
    dk: Float[Array, "B M G K"],
    dv: Float[Array, "B M G V"],
) -> tuple[Float[Array, "B G C R K"], Float[Array, "B M G K"], Float[Array, "B M G V"]]:
    """dq of the block, and dk and dv with the block's part added."""

    def visit(low: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq, dk, dv = carry
        tile = _Tile(plan, low, k, v, segments)
        s, slope = _logits(plan, block, tile)
        p = jnp.exp(s - lse[..., None])
        ds = p * (contract("bgcrv,bjgv->bgcrj", dout, tile.v) - d[..., None]) * slope
        ds = ds.astype(block.q.dtype)
        dv = tile.add(dv, contract("bgcrj,bgcrv->bjgv", p.astype(dout.dtype), dout))
        dk = tile.add(dk, contract("bgcrj,bgcrk->bjgk", ds, block.q))
        return dq + contract("bgcrj,bjgk->bgcrk", ds, tile.k), dk, dv

    dq = jnp.zeros_like(block.q, dtype=dk.dtype)
    return _visit_tiles(plan, block, k.shape[1], visit, (dq, dk, dv))


def _visit_tiles(plan: Plan, block: Block, keys: int, visit: Any, carry: Any) -> Any:
    """`carry = visit(low, carry)` for each tile that starts at key `low` of those the block reads."""
    low, high = plan.band.span(block.first, block.first + block.q.shape[2] - 1, keys)
    if plan.once:
        return visit(low, carry)
    tiles = -((low - high) // plan.tile)
    return jax.lax.fori_loop(0, tiles, lambda n, carry: visit(low + n * plan.tile, carry), carry)


class _Tile:
    """The keys low, low + 1, ...; the last tile moves back into the row and skips the keys of the tile before."""

    def __init__(self, plan: Plan, low: Array, k: Array, v: Array, segments: Array | None):
        self.low = low
        self.start = jnp.minimum(low, k.shape[1] - plan.tile)
        self.position = self.start + jnp.arange(plan.tile)
        self.k, self.v = (self._slice(x, plan.tile) for x in (k, v))
        self.segments = None if segments is None else self._slice(segments, plan.tile)

    def _slice(self, x: Array, size: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, self.start, size, axis=1)

    def add(self, total: Array, part: Array) -> Array:
        part += self._slice(total, part.shape[1])
        return jax.lax.dynamic_update_slice_in_dim(total, part, self.start, axis=1)


def _logits(
    plan: Plan, block: Block, tile: _Tile
) -> tuple[Float[Array, "B G C R J"], Float[Array, "B G C R J"] | float]:
    """s, -inf where a query does not read a key, and ds / d(q . k)."""
    s = plan.scale * contract("bgcrk,bjgk->bgcrj", block.q, tile.k)
    slope: Array | float = plan.scale
    if plan.logits_soft_cap is not None:
        capped = jnp.tanh(s / plan.logits_soft_cap)
        s, slope = plan.logits_soft_cap * capped, plan.scale * (1 - capped**2)
    return jnp.where(_mask(plan, block, tile), s, -jnp.inf), slope


def _mask(plan: Plan, block: Block, tile: _Tile) -> Bool[Array, "#B 1 C 1 J"]:
    query = block.first + jnp.arange(block.q.shape[2])
    mask = plan.band(query[:, None], tile.position[None, :]) & (tile.position >= tile.low)
    if block.segments is not None and tile.segments is not None:
        mask = mask & same_document(block.segments[:, :, None], tile.segments[:, None, :])
    return jnp.expand_dims(mask, (1, 3)) if mask.ndim == 3 else mask[None, None, :, None, :]
