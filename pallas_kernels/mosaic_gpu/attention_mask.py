"""Which tiles of tokens a block of others meets, and which pairs of tokens: the geometry of attention's kernels.

Query i is at position p_i = i + offset, key j at j, and i reads j where least <= p_i - j <= most. Kernels visit the
tiles [low, high) and mask only those outside of [full_low, full_high), where every pair is visible. A block that meets
no tile visits one, masked, so that no loop is empty.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

WGMMA = plgpu.Layout.WGMMA


class Band(NamedTuple):
    """least <= p - j <= most; None is no bound."""

    least: int | None
    most: int | None
    offset: int  # position of the first query
    keys: int  # that are there; those after them fill up a tile


class Span(NamedTuple):
    low: Any
    full_low: Any
    full_high: Any
    high: Any


def band(causal: bool, window: int | None, offset: int, keys: int) -> Band:
    """Causal: 0 <= p - j. A window: |p - j| < window."""
    least = 0 if causal else None if window is None else 1 - window
    return Band(least, None if window is None else window - 1, offset, keys)


def key_tiles(band: Band, first: Any, rows: int, tile: int) -> Span:
    """Tiles of keys that the query rows first, ..., first + rows - 1 meet."""
    first = first + band.offset
    return _tiles(first, first + rows - 1, band.least, band.most, band.keys, tile)


def query_tiles(band: Band, first: Any, keys: int, tile: int, rows: int) -> Span:
    """Tiles of the `rows` query rows that the keys first, ..., first + keys - 1 meet."""
    negative = lambda bound: None if bound is None else -bound  # noqa: E731
    first = first - band.offset
    span = _tiles(first, first + keys - 1, negative(band.most), negative(band.least), rows, tile)
    # keys that are not there are masked
    is_whole = first + band.offset + keys <= band.keys
    return span._replace(full_high=jnp.where(is_whole, span.full_high, span.full_low))


def _tiles(first: Any, last: Any, least: int | None, most: int | None, size: int, tile: int) -> Span:
    """Tiles of tokens x with least <= y - x <= most for some y in [first, last], or, the full ones, for all."""
    bound = lambda x: jnp.clip(x, 0, size)  # noqa: E731
    low = jnp.int32(0) if most is None else bound(first - most)
    full_low = jnp.int32(0) if most is None else bound(last - most)
    high = jnp.int32(size) if least is None else bound(last - least + 1)
    full_high = jnp.int32(size) if least is None else bound(first - least + 1)
    down = lambda x: lax.div(x, jnp.int32(tile))  # noqa: E731
    up = lambda x: lax.div(x + jnp.int32(tile - 1), jnp.int32(tile))  # noqa: E731
    start = jnp.minimum(down(low), max(-(-size // tile) - 1, 0))
    stop = jnp.maximum(up(high), start + 1)
    full_start = jnp.clip(up(full_low), start, stop)
    return Span(start, full_start, jnp.clip(down(full_high), full_start, stop), stop)


def edges(band: Band, size: int, tile: int) -> tuple[Band, Band]:
    """What is left to ask of pairs in tiles of keys before the full ones of `size` queries, and in those after; for
    tiles of queries and `size` keys the other way around. Where a window is wide no tile is on both of its edges."""
    if band.least is None or band.most is None or band.most - band.least < size + tile:
        return band, band
    return band._replace(least=None), band._replace(most=None)


def in_documents(span: Span, ids: jax.Array, others: jax.Array) -> jax.Array:
    """[B, N, 4]: the spans of N blocks, narrowed to tiles of the same documents.

    Args:
      span: [N] each.
      ids: [B, N, rows] of the blocks, others: [B, M, tile] of the tiles; padding is negative.
    """
    least = lambda x: jnp.min(jnp.where(x < 0, jnp.iinfo(jnp.int32).max, x), -1)  # noqa: E731
    most = lambda x: jnp.max(x, -1)  # noqa: E731
    is_one = lambda x: (most(x) == jnp.min(x, -1)) & (most(x) >= 0)  # noqa: E731
    t = jnp.arange(others.shape[1], dtype=jnp.int32)
    span = Span(*(jnp.broadcast_to(x, ids.shape[1]) for x in span))
    low, full_low, full_high, high = (x[:, None] for x in span)
    meets = (most(others)[:, None] >= least(ids)[..., None]) & (least(others)[:, None] <= most(ids)[..., None])
    meets &= (t >= low) & (t < high)
    start = jnp.where(jnp.any(meets, -1), jnp.argmax(meets, -1).astype(jnp.int32), span.low)
    stop = jnp.maximum(jnp.max(jnp.where(meets, t + 1, 0), -1), start + 1)
    full = is_one(ids)[..., None] & is_one(others)[:, None] & (most(ids)[..., None] == most(others)[:, None])
    full &= (t >= full_low) & (t < full_high)
    end = stop[..., None]
    full_start = jnp.min(jnp.where(full, t, end), -1)
    full_stop = jnp.min(jnp.where(~full & (t >= full_start[..., None]), t, end), -1)
    return jnp.stack([start, jnp.minimum(full_start, stop), jnp.minimum(full_stop, stop), stop], -1)


def mask(
    band: Band,
    shape: tuple[int, int],
    first: Any,
    first_key: Any,
    tile: int,
    ids: tuple[jax.Array, jax.Array] | None,
    queries: int = 0,
) -> jax.Array | None:
    """Which pairs of query rows first, first + 1, ... and keys first_key, ... are visible, queries on axis `queries`;
    None is all. `ids` are the documents of the queries and of the keys, which differ where one of them is padding."""
    # positions are numbers of rows or of columns; only comparisons are made for pairs
    along = lambda i: plgpu.broadcasted_iota(jnp.int32, (shape[i],), 0, layout=WGMMA.reduce(1 - i))  # noqa: E731
    over = lambda x, axis: lax.broadcast_in_dim(x, shape, [axis])  # noqa: E731
    position = along(queries) + (first + band.offset)
    key = over(along(1 - queries) + first_key, 1 - queries)
    conditions = []
    if band.least is not None:
        conditions.append(over(position - band.least, queries) >= key)
    if band.most is not None:
        conditions.append(over(position - band.most, queries) <= key)
    if band.keys % tile:
        conditions.append(key < band.keys)
    if ids is not None:
        ours, theirs = ids
        conditions.append(over(ours, queries) == over(theirs, 1 - queries))
    return functools.reduce(jnp.logical_and, conditions) if conditions else None
