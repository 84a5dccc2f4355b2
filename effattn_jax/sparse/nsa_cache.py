"""Native sparse attention over a cache: compressed tokens and a tail of raw ones, tokens to select from, a ring."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.precision import accumulation_dtype
from effattn_jax.sparse.cached_blocks import read_blocks
from effattn_jax.sparse.compressed import Sizes
from effattn_jax.sparse.documents import real_only
from effattn_jax.sparse.kv_buffer import (
    check_new,
    check_rewind,
    check_room,
    check_sizes,
    new_windows,
    of_rows,
    slots_of_windows,
    take,
    write,
    write_windows,
)
from effattn_jax.sparse.kv_ring import read_ring, write_ring
from effattn_jax.sparse.nsa import KV, Compressed, Phi, check_nsa, compressed_branch, gated, given_lists
from effattn_jax.sparse.places import places_from
from effattn_jax.sparse.pooling import complete_windows
from effattn_jax.sparse.top import check_budget
from effattn_jax.typing import Array, Float, Int, Queries

Rotate = Callable[[Float[Array, "B n G K"], Int[Array, "B n"]], Float[Array, "B n G K"]]


class NSACache(NamedTuple):
    """S slots per row to select from; the token at position p is in slot p."""

    selected: KV  # [B, S, G, .]
    compressed: KV  # [B, W, G, .], window c in slot c
    tail: KV  # [B, R, G, .], raw keys and values of the compressed branch of the last R tokens, the last one last
    positions: Int[Array, "B R"]  # of the tail, for the rotation of compressed keys
    recent: KV  # [B, R', G, .], a ring of the last R' tokens
    length: Int[Array, ""] | Int[Array, " B"]  # of all rows, or of each


def init_nsa_cache(
    batch: int,
    capacity: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    window: int = 512,
    spare: int = 0,
    dtype: Any = jnp.bfloat16,
    compressed_dtype: Any = jnp.float32,
) -> NSACache:
    """An empty cache of `capacity` tokens.

    Args:
      kernel_size, kernel_stride, window: as of `nsa`.
      spare: the most tokens that `rewind_nsa` takes back at once, after as many were appended since the last time.
      dtype: of keys and values; compressed_dtype: of compressed ones.
    """
    value_dim = key_dim if value_dim is None else value_dim
    check_sizes(batch=batch, capacity=capacity, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim)
    check_sizes(kernel_size=kernel_size, kernel_stride=kernel_stride, window=window)
    if spare < 0:
        checks.fail("spare", spare, "at least 0")

    def empty(slots: int, dtype: Any) -> KV:
        return KV(*(jnp.zeros((batch, slots, kv_heads, size), dtype) for size in (key_dim, value_dim)))

    return NSACache(
        empty(capacity, dtype),
        empty(slots_of_windows(capacity, kernel_size, kernel_stride), compressed_dtype),
        empty(kernel_size - 1 + spare, dtype),
        jnp.zeros((batch, kernel_size - 1 + spare), jnp.int32),
        empty(window + spare, dtype),
        jnp.zeros((), jnp.int32),
    )


def append_nsa(
    compressed: KV,
    selected: KV,
    recent: KV,
    cache: NSACache,
    *,
    phi_k: Phi | None = None,
    phi_v: Phi | None = None,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    positions: Int[Array, "B T"] | None = None,
    rotate: Rotate | None = None,
    new: Int[Array, " B"] | None = None,
) -> NSACache:
    """The cache with T more tokens, or of each row the first `new` of them; any split into calls gives the same.

    rotate(k~, positions) turns compressed keys by the `positions` of their windows' first tokens, counted on from the
    cache's length where None.
    """
    batch, length = selected.k.shape[:2]
    _check_cache(compressed, selected, recent, cache, kernel_size, kernel_stride, new)
    if length == 0:
        return cache
    before, count = of_rows(cache.length, batch), of_rows(length if new is None else new, batch)
    positions = before[:, None] + jnp.arange(length) if positions is None else positions
    positions = jnp.broadcast_to(positions, (batch, length))
    with_tail = [
        jnp.concatenate([old, x.astype(old.dtype)], axis=1)
        for old, x in zip((*cache.tail, cache.positions), (*compressed, positions), strict=True)
    ]
    kept = cache.positions.shape[1]
    which, there = new_windows(before, before + count, length, kernel_size, kernel_stride)
    index = (which * kernel_stride - before[:, None])[..., None] + jnp.arange(kernel_size) + kept
    windows = [take(x, jnp.clip(index, 0, kept + length - 1)) for x in with_tail]
    k, v = (
        jnp.mean(x, axis=2, dtype=accumulation_dtype(x.dtype)) if phi is None else phi(x)
        for x, phi in zip(windows, (phi_k, phi_v), strict=False)
    )
    k = k if rotate is None else rotate(k, windows[2][..., 0])
    *tail, of_tail = (take(x, count[:, None] + jnp.arange(kept)) for x in with_tail)
    return NSACache(
        KV(*(write(old, x, cache.length, new) for old, x in zip(cache.selected, selected, strict=True))),
        KV(*(write_windows(old, x, which, there) for old, x in zip(cache.compressed, (k, v), strict=True))),
        KV(*tail),
        of_tail,
        write_ring(cache.recent, recent, before, count),
        cache.length + (length if new is None else new),
    )


def cached_nsa(
    q: Queries,
    compressed: KV,
    selected: KV,
    recent: KV,
    gates: Float[Array, "B T H 3"],
    cache: NSACache,
    *,
    phi_k: Phi | None = None,
    phi_v: Phi | None = None,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    topk: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window: int = 512,
    lists: Int[np.ndarray, "n topk"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    rotate: Rotate | None = None,
    new: Int[Array, " B"] | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T H V"], NSACache]:
    """`nsa` of T new tokens over the cache and themselves, and the cache with them. Arguments as of `nsa`; the keys and
    values are those of the new tokens.

    Any split of a row into calls gives what one call of `nsa` gives, with keys and values in the cache's dtypes. One
    token alone touches only the compressed tokens, the blocks it lists and the window. positions, rotate: as of
    `append_nsa`; new: as of `cached_moba`.
    """
    sizes = Sizes(kernel_size, kernel_stride, block_size)
    check_nsa(q, compressed, selected, recent, gates, sizes, window, scale)
    (batch, length), capacity = q.shape[:2], cache.selected.k.shape[1]
    if lists is None:
        check_budget(topk, init_blocks, local_blocks)
    else:
        checks.check_shape("lists", lists, (-(-capacity // block_size), topk), "[n, topk]")
    checks.check_shape("selected", selected.k, (batch, length, None, None), "[B, T, G, K]")
    if cache.recent.k.shape[1] < window:
        checks.fail("cache", f"a ring of {cache.recent.k.shape[1]} tokens", f"at least the window of {window}")
    if length == 0:
        return jnp.zeros_like(q, shape=(*q.shape[:3], selected.v.shape[3])), cache
    old, before, place = cache, of_rows(cache.length, batch), places_from(cache.length, length, new)
    if new is not None:
        q, gates = real_only(q, place.relative), real_only(gates, place.relative)
    cache = append_nsa(
        compressed,
        selected,
        recent,
        cache,
        phi_k=phi_k,
        phi_v=phi_v,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        positions=positions,
        rotate=rotate,
        new=new,
    )
    out, chosen = compressed_branch(
        q,
        Compressed(*cache.compressed, complete_windows(capacity, kernel_size, kernel_stride)),
        place,
        sizes,
        blocks=-(-capacity // block_size),
        scale=scale,
        topk=topk,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
    )
    if lists is not None:
        chosen = jnp.broadcast_to(given_lists(lists, place, block_size), chosen.shape)
    of_blocks = read_blocks(
        q,
        *cache.selected,
        chosen,
        block_size=block_size,
        offset=old.length,
        scale=scale,
        implementation=implementation,
    )
    near = read_ring(q, recent, old.recent, cache.recent, place, before, window=window, scale=scale)
    return gated(gates, out, of_blocks, near).astype(q.dtype), cache


def rewind_nsa(cache: NSACache, length: int | Int[Array, ""] | Int[Array, " B"], *, kernel_size: int = 32) -> NSACache:
    """The cache as it was after `length` tokens, at most `spare` ago."""
    batch, kept = cache.positions.shape
    check_rewind(cache.length, length, kept - (kernel_size - 1))
    length = jnp.asarray(length, jnp.int32)
    index = jnp.arange(kept) - of_rows(cache.length - length, batch)[:, None]

    def back(x: Array) -> Array:
        return real_only(take(x, jnp.maximum(index, 0)), index)

    tail, positions = KV(*(back(x) for x in cache.tail)), back(cache.positions)
    return cache._replace(tail=tail, positions=positions, length=length)


def _check_cache(
    compressed: KV,
    selected: KV,
    recent: KV,
    cache: NSACache,
    kernel_size: int,
    kernel_stride: int,
    new: Array | None,
) -> None:
    (batch, capacity), length = cache.selected.k.shape[:2], selected.k.shape[1]
    for name, branch, kept in (
        ("compressed", compressed, cache.selected),
        ("selected", selected, cache.selected),
        ("recent", recent, cache.recent),
    ):
        for x, slots in zip(branch, kept, strict=True):
            checks.check_shape(name, x, (batch, length, *slots.shape[2:]), "[B, T, G, K or V] of the cache")
    windows = slots_of_windows(capacity, kernel_size, kernel_stride)
    checks.check_shape("cache.compressed", cache.compressed.k, (batch, windows, None, None), "[B, windows, G, K]")
    if cache.tail.k.shape[1] < kernel_size - 1:
        checks.fail("cache", f"a tail of {cache.tail.k.shape[1]} tokens", f"at least {kernel_size - 1} of a window")
    check_new(new, cache.length, batch)
    check_room(cache.length, capacity, length, new)
