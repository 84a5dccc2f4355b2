"""Keys and values in pages of a pool that all rows share; a table lists the pages of each row.

Rows may differ in length. No two rows share a page. What a slot without a token holds is never read.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.sparse.kv_buffer import check_sizes
from effattn_jax.typing import Array, Bool, Float, Int


class PagedCache(NamedTuple):
    """The token at position p of row b is in slot p mod page of page table[b, p // page]."""

    k: Float[Array, "P page G K"]
    v: Float[Array, "P page G V"]
    table: Int[Array, "B N"]  # -1 is none
    length: Int[Array, " B"]
    free: Bool[Array, " P"]


def init_paged_cache(
    batch: int,
    pages: int,
    row_pages: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    *,
    page_size: int = 16,
    dtype: Any = jnp.bfloat16,
) -> PagedCache:
    """An empty cache.

    Args:
      batch: B, rows.
      pages: P, pages of the pool, for all rows together.
      row_pages: N, the most pages of one row.
      kv_heads: G.
      key_dim: K.
      value_dim: V; None means K.
      page_size: tokens of a page.
      dtype: of keys and values.

    Raises:
      ValueError: a size below 1.
    """
    value_dim = key_dim if value_dim is None else value_dim
    check_sizes(
        batch=batch,
        pages=pages,
        row_pages=row_pages,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        page_size=page_size,
    )
    return PagedCache(
        jnp.zeros((pages, page_size, kv_heads, key_dim), dtype),
        jnp.zeros((pages, page_size, kv_heads, value_dim), dtype),
        jnp.full((batch, row_pages), -1, jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.ones(pages, bool),
    )


def append(
    cache: PagedCache,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    counts: Int[Array, " B"] | None = None,
) -> PagedCache:
    """The cache with up to T more tokens a row. Any split into calls gives the same tokens at the same positions.

    Args:
      cache: what `init_paged_cache` or the last call returned.
      k, v: [B, T, G, K] and [B, T, G, V], the new tokens.
      counts: [B], how many of the T a row takes, from the first; None: all. The others may hold anything.

    Raises:
      ValueError: shapes that do not fit; counts outside of 0..T; too few pages. Under `jax.jit`, where lengths are not
        known, the caller must see to it that the pages suffice: tokens without a page are lost.
    """
    checks.check_shape("k", k, (cache.length.shape[0], None, *cache.k.shape[2:]), "[B, T, G, K] of the cache")
    checks.check_shape("v", v, (*k.shape[:2], *cache.v.shape[2:]), "[B, T, G, V] of the cache")
    if counts is None:
        counts = jnp.asarray(np.full(k.shape[0], k.shape[1], np.int32))
    checks.check_shape("counts", counts, (k.shape[0],), "[B]")
    _check_room(cache, counts, k.shape[1])
    counts = jnp.asarray(counts, cache.length.dtype)
    before = cache.length
    cache = _with_pages(cache, before + counts)
    places = jnp.arange(k.shape[1])
    page, slot = locate(cache, jnp.where(places < counts[:, None], before[:, None] + places, -1))
    write = lambda pool, new: pool.at[page, slot].set(new.astype(pool.dtype), mode="drop")  # noqa: E731
    return cache._replace(k=write(cache.k, k), v=write(cache.v, v))


def rewind(cache: PagedCache, lengths: int | Int[Array, " B"]) -> PagedCache:
    """The cache as it was when its rows had `lengths` tokens; pages behind them are free again.

    Raises:
      ValueError: lengths below 0 or above the row's, where they are known.
    """
    lengths = jnp.broadcast_to(jnp.asarray(lengths, cache.length.dtype), cache.length.shape)
    known = not any(isinstance(x, jax.core.Tracer) for x in (lengths, cache.length))
    if known and bool(jnp.any((lengths < 0) | (lengths > cache.length))):
        checks.fail("lengths", np.asarray(lengths).tolist(), f"from 0 to {np.asarray(cache.length).tolist()}")
    lengths = jnp.clip(lengths, 0, cache.length)
    behind = jnp.arange(cache.table.shape[1]) >= _pages(cache, lengths)[:, None]
    freed = jnp.where(behind & (cache.table >= 0), cache.table, len(cache.free))
    return cache._replace(
        table=jnp.where(behind, -1, cache.table), length=lengths, free=cache.free.at[freed].set(True, mode="drop")
    )


def reset(cache: PagedCache, rows: Bool[Array, " B"]) -> PagedCache:
    """The cache without any token of the rows where `rows` is true."""
    checks.check_shape("rows", rows, cache.length.shape, "[B]")
    return rewind(cache, jnp.where(jnp.asarray(rows, bool), 0, cache.length))


def gather(cache: PagedCache) -> tuple[Float[Array, "B S G K"], Float[Array, "B S G V"]]:
    """Keys and values in order of position, S = N page of each row, and zeros behind the last."""
    size = cache.table.shape[1] * cache.k.shape[1]
    position = jnp.arange(size)
    there = position < cache.length[:, None]
    page, slot = locate(cache, jnp.where(there, position, -1))
    take = lambda pool: jnp.where(there[..., None, None], pool[page, slot], 0)  # noqa: E731
    return take(cache.k), take(cache.v)


def locate(cache: PagedCache, position: Int[Array, "B ..."]) -> tuple[Int[Array, "B ..."], Int[Array, "B ..."]]:
    """The page and the slot in it of positions of each row; page P for what is negative or has none."""
    page_size, row_pages = cache.k.shape[1], cache.table.shape[1]
    which = position // page_size
    flat = jnp.clip(which, 0, row_pages - 1).reshape(position.shape[0], -1)
    page = jnp.take_along_axis(cache.table, flat, axis=1).reshape(position.shape)
    exists = (position >= 0) & (which < row_pages) & (page >= 0)
    return jnp.where(exists, page, len(cache.free)), position % page_size


def pages_since(cache: PagedCache, since: Int[Array, " B"], most: int) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    """The pages that hold the tokens since, ..., length - 1 of each row, `most` of them at the most, and how many
    tokens of the row each page holds; page P and 0 tokens where there are no more. For what is kept per page."""
    page_size = cache.k.shape[1]
    first = (since // page_size)[:, None] + jnp.arange(1 + -(-max(0, most - 1) // page_size))
    tokens = jnp.clip(cache.length[:, None] - first * page_size, 0, page_size)
    page, _ = locate(cache, jnp.where(tokens > 0, first * page_size, -1))
    return page, tokens


def _pages(cache: PagedCache, length: Int[Array, " B"]) -> Int[Array, " B"]:
    return -(-length // cache.k.shape[1])


def _with_pages(cache: PagedCache, length: Int[Array, " B"]) -> PagedCache:
    """Rows of `length` tokens with a page for each: the lowest free ones, row by row."""
    pages = len(cache.free)
    had, need = _pages(cache, cache.length), _pages(cache, length)
    until = jnp.cumsum(need - had)
    entry = jnp.arange(cache.table.shape[1])
    new = (entry >= had[:, None]) & (entry < need[:, None])
    (order,) = jnp.nonzero(cache.free, size=pages, fill_value=pages)
    which = (until - (need - had))[:, None] + entry - had[:, None]
    taken = jnp.where(new & (which < pages), order[jnp.clip(which, 0, pages - 1)], pages)
    table = jnp.where(new, jnp.where(taken < pages, taken, -1), cache.table)
    free = cache.free.at[taken].set(False, mode="drop")
    return cache._replace(table=table.astype(cache.table.dtype), length=length, free=free)


def _check_room(cache: PagedCache, counts: Any, new: int) -> None:
    if isinstance(counts, jax.core.Tracer):
        return
    counts = np.asarray(counts)
    if np.any((counts < 0) | (counts > new)):
        checks.fail("counts", counts.tolist(), f"from 0 to {new} tokens")
    if isinstance(cache.length, jax.core.Tracer) or isinstance(cache.free, jax.core.Tracer):
        return
    length = np.asarray(cache.length)
    page_size = cache.k.shape[1]
    had, need = (-(-x // page_size) for x in (length, length + counts))
    if np.any(need > cache.table.shape[1]):
        checks.fail("k", f"rows of {(length + counts).tolist()} tokens", f"at most {cache.table.shape[1]} pages a row")
    if np.sum(need - had) > np.sum(np.asarray(cache.free)):
        checks.fail("k", f"{np.sum(need - had)} more pages", f"at most the {np.sum(np.asarray(cache.free))} free ones")
