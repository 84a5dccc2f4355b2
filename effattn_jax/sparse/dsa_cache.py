"""DeepSeek sparse attention over a cache: keys, values, and the indexer's key of every token."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.sparse.cached_blocks import read_blocks
from effattn_jax.sparse.dsa import check_indexer, index_scores
from effattn_jax.sparse.kv_buffer import check_new, check_rewind, check_room, check_sizes, write
from effattn_jax.sparse.places import places_from
from effattn_jax.sparse.query_chunks import over_queries
from effattn_jax.sparse.top import top_entries
from effattn_jax.typing import Array, Float, Int, Queries


class DSACache(NamedTuple):
    """S slots per row; the token at position p is in slot p."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    index_k: Float[Array, "B S I"]
    length: Int[Array, ""] | Int[Array, " B"]  # of all rows, or of each


def init_dsa_cache(
    batch: int,
    capacity: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    *,
    index_dim: int = 128,
    dtype: Any = jnp.bfloat16,
) -> DSACache:
    """An empty cache of `capacity` tokens, in `dtype`."""
    value_dim = key_dim if value_dim is None else value_dim
    check_sizes(
        batch=batch, capacity=capacity, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim, index_dim=index_dim
    )
    return DSACache(
        jnp.zeros((batch, capacity, kv_heads, key_dim), dtype),
        jnp.zeros((batch, capacity, kv_heads, value_dim), dtype),
        jnp.zeros((batch, capacity, index_dim), dtype),
        jnp.zeros((), jnp.int32),
    )


def append_dsa(
    cache: DSACache,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    index_k: Float[Array, "B T I"],
    *,
    new: Int[Array, " B"] | None = None,
) -> DSACache:
    """The cache with T more tokens, or of each row the first `new` of them."""
    (batch, capacity), tokens = cache.k.shape[:2], k.shape[1]
    of = (("k", k, cache.k), ("v", v, cache.v), ("index_k", index_k, cache.index_k))
    for name, x, buffer in of:
        checks.check_shape(name, x, (batch, tokens, *buffer.shape[2:]), "[B, T, ...] of the cache")
    check_new(new, cache.length, batch)
    check_room(cache.length, capacity, tokens, new)
    if tokens == 0:
        return cache
    keys, values, index_keys = (write(buffer, x, cache.length, new) for _, x, buffer in of)
    return DSACache(keys, values, index_keys, cache.length + (tokens if new is None else new))


def cached_dsa(
    q: Queries,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    index_q: Float[Array, "B T J I"],
    index_k: Float[Array, "B T I"],
    index_weights: Float[Array, "B T J"],
    cache: DSACache,
    *,
    topk: int = 2048,
    new: Int[Array, " B"] | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T H V"], DSACache]:
    """`dsa` of T new tokens over the cache and themselves, and the cache with them. Arguments as of `dsa`.

    Any split of a row into calls gives what one call of `dsa` gives, with keys and values in the cache's dtype. A token
    alone touches all keys of the indexer, and of the others the topk it lists only. `new`: as of `cached_moba`.
    """
    check_qkv(q, k, v)
    check_numbers(scale, None)
    check_indexer(q, k, index_q, index_k, index_weights, topk, None)
    length, before = q.shape[1], cache.length
    checks.check_shape("k", k, (q.shape[0], length, None, None), "[B, T, G, K]")
    if length == 0:
        return jnp.zeros_like(q, shape=(*q.shape[:3], v.shape[3])), cache
    cache = append_dsa(cache, k, v, index_k, new=new)
    slots = cache.k.shape[1]
    keys = jax.lax.stop_gradient(cache.index_k)
    relative = places_from(before, length, new).relative

    def of_chunk(q: Array, weights: Array, relative: Array) -> Int[Array, "B C n"]:
        there = jnp.arange(slots) <= relative[..., None]
        return top_entries(jnp.where(there, index_scores(q, keys, weights), -jnp.inf), min(topk, slots))

    numbers = index_q.shape[0] * index_q.shape[2] * slots
    tokens = over_queries(of_chunk, numbers, *jax.lax.stop_gradient((index_q, index_weights)), relative)
    lists = jnp.broadcast_to(tokens[:, :, None], (*tokens.shape[:2], k.shape[2], tokens.shape[2]))
    out = read_blocks(
        q, cache.k, cache.v, lists, block_size=1, offset=before, scale=scale, implementation=implementation
    )
    return out, cache


def rewind_dsa(cache: DSACache, length: int | Int[Array, ""] | Int[Array, " B"]) -> DSACache:
    """The cache as it was after `length` tokens: tokens behind are not read, and are written anew."""
    check_rewind(cache.length, length)
    return cache._replace(length=jnp.asarray(length, jnp.int32))
