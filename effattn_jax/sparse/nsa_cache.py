"""Native sparse attention over a cache: compressed tokens and a tail of raw ones, tokens to select from, a ring."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.precision import accumulation_dtype
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.cache import KVCache, cached_attention, init_cache
from effattn_jax.sparse.compressed import Sizes
from effattn_jax.sparse.kv_buffer import (
    check_rewind,
    check_room,
    check_sizes,
    new_windows,
    slots_of_windows,
    write,
    write_windows,
)
from effattn_jax.sparse.nsa import KV, Compressed, Phi, check_nsa, compressed_branch, gated
from effattn_jax.sparse.places import places_from
from effattn_jax.sparse.pooling import complete_windows
from effattn_jax.sparse.top import check_budget
from effattn_jax.typing import Array, Float, Int, Queries


class NSACache(NamedTuple):
    """S slots per row to select from; the token at position p is in slot p. Rows have the same length."""

    selected: KV  # [B, S, G, .]
    compressed: KV  # [B, W, G, .], window c in slot c
    tail: KV  # [B, R, G, .], raw keys and values of the compressed branch of the last R tokens, the last one last
    recent: KVCache
    length: Int[Array, ""]


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
        init_cache(batch, window + spare, kv_heads, key_dim, value_dim, dtype),
        jnp.zeros((), jnp.int32),
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
    scale: float | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T H V"], NSACache]:
    """`nsa` of T new tokens over the cache and themselves, and the cache with them. Arguments as of `nsa`; the keys and
    values are those of the new tokens.

    Any split of a row into calls gives what one call of `nsa` gives, with keys and values in the cache's dtypes.
    """
    sizes = Sizes(kernel_size, kernel_stride, block_size)
    check_nsa(q, compressed, selected, recent, gates, sizes, window, scale)
    check_budget(topk, init_blocks, local_blocks)
    _check_cache(q, compressed, selected, cache, sizes)
    length, capacity, before = q.shape[1], cache.selected.k.shape[1], cache.length
    if length == 0:
        return jnp.zeros_like(q, shape=(*q.shape[:3], selected.v.shape[3])), cache
    parts = [
        _append_compressed(*of, before, phi, sizes)
        for of, phi in zip(zip(cache.compressed, cache.tail, compressed, strict=True), (phi_k, phi_v), strict=True)
    ]
    tokens, tail = (KV(*x) for x in zip(*parts, strict=True))
    everything = KV(*(write(buffer, x, before) for buffer, x in zip(cache.selected, selected, strict=True)))
    out, lists = compressed_branch(
        q,
        Compressed(*tokens, complete_windows(capacity, kernel_size, kernel_stride)),
        places_from(before, length),
        sizes,
        blocks=-(-capacity // block_size),
        scale=scale,
        topk=topk,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
    )
    of_blocks, _ = block_attention(
        q,
        *everything,
        lists,
        block_size=block_size,
        offset=before,
        scale=scale,
        implementation=implementation,
    )
    near, ring = cached_attention(q, *recent, cache.recent, window=window, scale=scale)
    cache = NSACache(everything, tokens, tail, ring, before + length)
    return gated(gates, out, of_blocks, near).astype(q.dtype), cache


def _append_compressed(
    buffer: Float[Array, "B W G K"],
    tail: Float[Array, "B R G K"],
    new: Float[Array, "B T G K"],
    length: Int[Array, ""],
    phi: Phi | None,
    sizes: Sizes,
) -> tuple[Float[Array, "B W G K"], Float[Array, "B R G K"]]:
    """With the windows that the new tokens complete, and the last R tokens."""
    kept = tail.shape[1]
    tokens = jnp.concatenate([tail, new.astype(tail.dtype)], axis=1)
    which, total = new_windows(length, new.shape[1], sizes.kernel, sizes.stride)
    index = which[:, None] * sizes.stride + jnp.arange(sizes.kernel) - length + kept
    windows = tokens[:, jnp.clip(index, 0, tokens.shape[1] - 1)]
    values = jnp.mean(windows, axis=2, dtype=accumulation_dtype(windows.dtype)) if phi is None else phi(windows)
    return write_windows(buffer, values, which, total), tokens[:, tokens.shape[1] - kept :]


def rewind_nsa(cache: NSACache, length: int | Int[Array, ""], *, kernel_size: int = 32) -> NSACache:
    """The cache as it was after `length` tokens, at most `spare` ago."""
    kept = cache.tail.k.shape[1]
    check_rewind(cache.length, length, kept - (kernel_size - 1))
    length = jnp.asarray(length, jnp.int32)
    index = jnp.arange(kept) - (cache.length - length)

    def back(x: Array) -> Array:
        return jnp.where((index >= 0)[:, None, None], x[:, jnp.maximum(index, 0)], 0)

    return cache._replace(
        tail=KV(*(back(x) for x in cache.tail)), recent=cache.recent._replace(length=length), length=length
    )


def _check_cache(q: Array, compressed: KV, selected: KV, cache: NSACache, sizes: Sizes) -> None:
    batch, length = q.shape[:2]
    capacity = cache.selected.k.shape[1]
    for name, branch in (("compressed", compressed), ("selected", selected)):
        for x, kept in zip(branch, cache.selected, strict=True):
            checks.check_shape(name, x, (batch, length, *kept.shape[2:]), "[B, T, G, K or V] of the cache")
    slots = slots_of_windows(capacity, sizes.kernel, sizes.stride)
    checks.check_shape("cache.compressed", cache.compressed.k, (batch, slots, None, None), "[B, windows, G, K]")
    if cache.tail.k.shape[1] < sizes.kernel - 1:
        checks.fail("cache", f"a tail of {cache.tail.k.shape[1]} tokens", f"at least {sizes.kernel - 1} of a window")
    check_room(cache.length, capacity, length)
