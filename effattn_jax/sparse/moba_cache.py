"""Mixture of block attention over a cache: keys, values, and the mean key of every block that is full."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.cached_blocks import read_blocks
from effattn_jax.sparse.kv_buffer import (
    append_means,
    check_new,
    check_rewind,
    check_room,
    check_sizes,
    slots_of_windows,
    write,
)
from effattn_jax.sparse.moba import check_moba, choose
from effattn_jax.sparse.places import places_from
from effattn_jax.sparse.pooling import complete_windows
from effattn_jax.typing import Array, Float, Int, Queries


class MoBACache(NamedTuple):
    """S slots per row; the token at position p is in slot p."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    means: Float[Array, "B W G K"]  # float32
    length: Int[Array, ""] | Int[Array, " B"]  # of all rows, or of each


def init_moba_cache(
    batch: int,
    capacity: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    *,
    block_size: int = 512,
    dtype: Any = jnp.bfloat16,
) -> MoBACache:
    """An empty cache of `capacity` tokens; keys and values are kept in `dtype`."""
    value_dim = key_dim if value_dim is None else value_dim
    check_sizes(
        batch=batch, capacity=capacity, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim, block_size=block_size
    )
    slots = slots_of_windows(capacity, block_size, block_size)
    return MoBACache(
        jnp.zeros((batch, capacity, kv_heads, key_dim), dtype),
        jnp.zeros((batch, capacity, kv_heads, value_dim), dtype),
        jnp.zeros((batch, slots, kv_heads, key_dim), jnp.promote_types(dtype, jnp.float32)),
        jnp.zeros((), jnp.int32),
    )


def append_moba(
    cache: MoBACache,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    block_size: int = 512,
    new: Int[Array, " B"] | None = None,
) -> MoBACache:
    """The cache with T more tokens, or of each row the first `new` of them; any split into calls gives the same."""
    (batch, capacity, groups, key_dim), tokens = cache.k.shape, k.shape[1]
    checks.check_shape("k", k, (batch, None, groups, key_dim), "[B, T, G, K] of the cache")
    checks.check_shape("v", v, (batch, tokens, groups, cache.v.shape[3]), "[B, T, G, V] of the cache")
    check_new(new, cache.length, batch)
    slots = slots_of_windows(capacity, block_size, block_size)
    checks.check_shape("cache.means", cache.means, (batch, slots, groups, key_dim), "[B, blocks, G, K]")
    check_room(cache.length, capacity, tokens, new)
    if tokens == 0:
        return cache
    keys, values = (write(buffer, x, cache.length, new) for buffer, x in ((cache.k, k), (cache.v, v)))
    length = cache.length + (tokens if new is None else new)
    means = append_means(cache.means, keys, cache.length, length, tokens, block_size, block_size)
    return MoBACache(keys, values, means, length)


def cached_moba(
    q: Queries,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    cache: MoBACache,
    *,
    block_size: int = 512,
    topk: int = 3,
    new: Int[Array, " B"] | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T H V"], MoBACache]:
    """`moba` of T new tokens over the cache and themselves, and the cache with them. Arguments as of `moba`.

    Any split of a row into calls gives what one call of `moba` gives, with k and v in the cache's dtype. A token reads
    topk * block_size keys and the mean of every block; one alone touches nothing else of the cache. `new`: [B], of each
    row the first so many tokens are real, the others are not kept and return 0; the cache's length is [B] then.
    """
    check_moba(q, k, v, block_size, topk, None, scale)
    checks.check_shape("k", k, (q.shape[0], q.shape[1], None, None), "[B, T, G, K]")
    if q.shape[1] == 0:
        return jnp.zeros_like(q, shape=(*q.shape[:3], v.shape[3])), cache
    before = cache.length
    cache = append_moba(cache, k, v, block_size=block_size, new=new)
    windows = complete_windows(cache.k.shape[1], block_size, block_size)
    lists = choose(q, cache.means, windows, places_from(before, q.shape[1], new), block_size, topk)
    out = read_blocks(
        q,
        cache.k,
        cache.v,
        lists,
        block_size=block_size,
        offset=before,
        scale=scale,
        implementation=implementation,
    )
    return out, cache


def rewind_moba(cache: MoBACache, length: int | Int[Array, ""] | Int[Array, " B"]) -> MoBACache:
    """The cache as it was after `length` tokens: tokens and means behind are not read, and are written anew."""
    check_rewind(cache.length, length)
    return cache._replace(length=jnp.asarray(length, jnp.int32))
