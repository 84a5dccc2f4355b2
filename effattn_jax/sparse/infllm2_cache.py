"""InfLLM-v2 over a cache: keys, values and mean keys of windows; dense while it holds few tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.attention import attend
from effattn_jax.sparse.cached_blocks import read_blocks
from effattn_jax.sparse.compressed import Sizes
from effattn_jax.sparse.infllm2 import COARSE, Pooled, check_infllm2, choose
from effattn_jax.sparse.kv_buffer import (
    append_means,
    check_new,
    check_rewind,
    check_room,
    check_sizes,
    slots_of_windows,
    write,
)
from effattn_jax.sparse.places import places_from
from effattn_jax.sparse.pooling import complete_windows
from effattn_jax.typing import Array, Float, Int, Queries


class InfLLM2Cache(NamedTuple):
    """S slots per row; the token at position p is in slot p."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    means: Float[Array, "B W G K"]  # float32
    coarse: Float[Array, "B W' G K"]  # of windows four times as wide and as far apart
    length: Int[Array, ""] | Int[Array, " B"]  # of all rows, or of each


def init_infllm2_cache(
    batch: int,
    capacity: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    dtype: Any = jnp.bfloat16,
) -> InfLLM2Cache:
    """An empty cache of `capacity` tokens; keys and values are kept in `dtype`."""
    value_dim = key_dim if value_dim is None else value_dim
    check_sizes(batch=batch, capacity=capacity, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim)
    check_sizes(kernel_size=kernel_size, kernel_stride=kernel_stride)

    def means(times: int) -> Array:
        slots = slots_of_windows(capacity, times * kernel_size, times * kernel_stride)
        return jnp.zeros((batch, slots, kv_heads, key_dim), jnp.promote_types(dtype, jnp.float32))

    return InfLLM2Cache(
        jnp.zeros((batch, capacity, kv_heads, key_dim), dtype),
        jnp.zeros((batch, capacity, kv_heads, value_dim), dtype),
        means(1),
        means(COARSE),
        jnp.zeros((), jnp.int32),
    )


def append_infllm2(
    cache: InfLLM2Cache,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    new: Int[Array, " B"] | None = None,
) -> InfLLM2Cache:
    """The cache with T more tokens, or of each row the first `new` of them; any split into calls gives the same."""
    (batch, capacity, groups, key_dim), tokens = cache.k.shape, k.shape[1]
    checks.check_shape("k", k, (batch, None, groups, key_dim), "[B, T, G, K] of the cache")
    checks.check_shape("v", v, (batch, tokens, groups, cache.v.shape[3]), "[B, T, G, V] of the cache")
    check_new(new, cache.length, batch)
    for name, means, times in (("cache.means", cache.means, 1), ("cache.coarse", cache.coarse, COARSE)):
        slots = slots_of_windows(capacity, times * kernel_size, times * kernel_stride)
        checks.check_shape(name, means, (batch, slots, groups, key_dim), "[B, windows, G, K]")
    check_room(cache.length, capacity, tokens, new)
    if tokens == 0:
        return cache
    keys, values = (write(buffer, x, cache.length, new) for buffer, x in ((cache.k, k), (cache.v, v)))
    length = cache.length + (tokens if new is None else new)
    fine, coarse = (
        append_means(means, keys, cache.length, length, tokens, times * kernel_size, times * kernel_stride)
        for means, times in ((cache.means, 1), (cache.coarse, COARSE))
    )
    return InfLLM2Cache(keys, values, fine, coarse, length)


def cached_infllm2(
    q: Queries,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    cache: InfLLM2Cache,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    init_blocks: int = 1,
    topk: int = 64,
    window: int = 2048,
    dense_len: int = 8192,
    coarse_lse: bool = False,
    new: Int[Array, " B"] | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T H V"], InfLLM2Cache]:
    """`infllm2` of T new tokens over the cache and themselves, and the cache with them. Arguments as of `infllm2`.

    The tokens read everything if the cache then holds less than dense_len of their row: it holds rows of different
    lengths at the cost of both, unless its capacity or dense_len = -1 decides for all. Apart from that any split of a
    row into calls gives what one call of `infllm2` gives, with k and v in the cache's dtype, and a token alone touches
    the means and the blocks it lists only. `new`: as of `cached_moba`.
    """
    sizes = Sizes(kernel_size, kernel_stride, block_size)
    check_infllm2(q, k, v, sizes, init_blocks, topk, window, dense_len, scale)
    (batch, length), capacity = q.shape[:2], cache.k.shape[1]
    checks.check_shape("k", k, (batch, length, None, None), "[B, T, G, K]")
    if length == 0:
        return jnp.zeros_like(q, shape=(*q.shape[:3], v.shape[3])), cache
    before = cache.length
    cache = append_infllm2(cache, k, v, kernel_size=kernel_size, kernel_stride=kernel_stride, new=new)
    place = places_from(before, length, new)

    def pooled(means: Array, times: int) -> Pooled:
        tokens, stride = times * kernel_size, times * kernel_stride
        return means, complete_windows(capacity, tokens, stride), tokens

    def whole(q: Array, k: Array, v: Array, offset: Int[Array, ""]) -> Array:
        return attend(
            q,
            k,
            v,
            offset=offset,
            causal=True,
            window=None,
            sinks=None,
            query_segments=None,
            key_segments=None,
            scale=scale,
            logits_soft_cap=None,
            implementation=None,
            return_lse=False,
        )[0]

    def dense(_: None) -> Array:
        if jnp.ndim(before) == 0:
            return whole(q, cache.k, cache.v, before)
        row = lambda q, k, v, offset: whole(q[None], k[None], v[None], offset)[0]  # noqa: E731
        return real(jax.vmap(row)(q, cache.k, cache.v, before))

    def real(out: Array) -> Array:
        return jnp.where((place.relative < 0)[..., None, None], 0, out)

    def sparse(_: None) -> Array:
        lists = choose(
            q,
            pooled(cache.means, 1),
            pooled(cache.coarse, COARSE) if coarse_lse else None,
            place,
            sizes,
            blocks=-(-capacity // block_size),
            init_blocks=init_blocks,
            topk=topk,
            window=window,
            scale=scale,
        )
        return read_blocks(
            q,
            cache.k,
            cache.v,
            lists,
            block_size=block_size,
            offset=before,
            scale=scale,
            implementation=implementation,
        )

    if capacity < dense_len:
        return dense(None), cache
    if (length if new is None else 0) >= dense_len:
        return sparse(None), cache
    short = jnp.asarray(cache.length < dense_len)
    if short.ndim == 0:
        return jax.lax.cond(short, dense, sparse, None), cache
    return jnp.where(short[:, None, None, None], dense(None), sparse(None)), cache


def rewind_infllm2(cache: InfLLM2Cache, length: int | Int[Array, ""] | Int[Array, " B"]) -> InfLLM2Cache:
    """The cache as it was after `length` tokens: tokens and means behind are not read, and are written anew."""
    check_rewind(cache.length, length)
    return cache._replace(length=jnp.asarray(length, jnp.int32))
