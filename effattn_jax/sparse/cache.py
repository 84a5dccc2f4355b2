"""Keys and values of the past, for decoding: a buffer of fixed capacity, or with a window a ring of the last tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.attention import AttentionOut, check
from effattn_jax.sparse.documents import real_only
from effattn_jax.sparse.int8 import dequantised, quantised
from effattn_jax.sparse.readable import Prefix, Readable, Row, Slots
from effattn_jax.typing import Array, Float, Int, Queries, SegmentIds


class KVCache(NamedTuple):
    """S slots per row; the token at position p (from 0, padding counted) is in slot p mod S."""

    k: Float[Array, "B S G K"] | Int[Array, "B S G K"]
    v: Float[Array, "B S G V"] | Int[Array, "B S G V"]
    segment_ids: Int[Array, "B S"]  # document of each slot; -1 is an unused slot or padding, never read
    length: Int[Array, ""]  # tokens appended so far, padding included
    segment: Int[Array, " B"]  # document of the last real token of each row
    k_scale: Float[Array, "B S G"] | None = None  # of int8: a key is its integers times this
    v_scale: Float[Array, "B S G"] | None = None


def init_cache(
    batch: int, capacity: int, kv_heads: int, key_dim: int, value_dim: int | None = None, dtype: Any = jnp.bfloat16
) -> KVCache:
    """An empty cache: zeros, because what is not finite would reach the sums even under a weight of zero.

    Args:
      batch: B, rows.
      capacity: S, the most tokens it ever holds; for layers with a window, any number of tokens from the window on.
      kv_heads: G.
      key_dim: K.
      value_dim: V; None means K.
      dtype: of keys and values; int8 keeps them with a float32 scale for each token and head (Character.AI 2024,
        "Optimizing AI Inference at Character.AI"), see `effattn_jax.sparse.int8`.
    """
    sizes = {"batch": batch, "capacity": capacity, "kv_heads": kv_heads, "key_dim": key_dim}
    for name, size in sizes.items():
        if size < 1:
            checks.fail(name, size, "at least 1")
    scale = lambda: jnp.zeros((batch, capacity, kv_heads), jnp.float32) if dtype == jnp.int8 else None  # noqa: E731
    return KVCache(
        k=jnp.zeros((batch, capacity, kv_heads, key_dim), dtype),
        v=jnp.zeros((batch, capacity, kv_heads, key_dim if value_dim is None else value_dim), dtype),
        segment_ids=jnp.full((batch, capacity), -1, jnp.int32),
        length=jnp.zeros((), jnp.int32),
        segment=jnp.zeros((batch,), jnp.int32),
        k_scale=scale(),
        v_scale=scale(),
    )


def cached_attention(
    q: Queries,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    cache: KVCache,
    *,
    window: int | None = None,
    sinks: Float[Array, " H"] | None = None,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    implementation: Implementation = None,
) -> tuple[AttentionOut, KVCache]:
    """Causal `attention` of T new tokens over the tokens in the cache and themselves; they are appended to it.

    Any split of a sequence into calls gives what one call of `attention` gives (with k and v in the cache's dtype).
    One token reads all slots once, O(S). More tokens cost O(T (filled + T)), with a window O(T window + S).

    Args:
      q, k, v: [B, T, H, K], [B, T, G, K], [B, T, G, V], the new tokens.
      cache: what `init_cache` or the last call returned.
      window: see `attention`. The capacity must be at least the window, and then never runs out. Without a window at
        most `capacity` tokens fit in all; under `jax.jit`, where the length is not known, the caller must see to it.
      segment_ids: [B, T] documents of the new tokens, never decreasing along a row from call to call; negative ids mark
        padding (left-padded rows: -1 first). None: they continue the document of the row's last real token, 0 at first.
      sinks, scale, logits_soft_cap, implementation: see `attention`.

    Returns:
      out [B, T, H, V] in q's dtype, and the cache with the tokens.

    Raises:
      ValueError: what `attention` raises; a cache of other sizes; a window above the capacity; a full cache.
    """
    check(q, k, v, window, sinks, scale, logits_soft_cap)
    checks.check_shape("k", k, (*q.shape[:2], None, None), "[B, T, G, K]")
    readable, cache = append(k, v, cache, window=window, segment_ids=segment_ids)
    options: dict[str, Any] = {
        "window": window,
        "sinks": sinks,
        "scale": scale,
        "logits_soft_cap": logits_soft_cap,
        "implementation": implementation,
    }
    return readable.read(q, **options), cache


def append(
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    cache: KVCache,
    *,
    window: int | None = None,
    segment_ids: SegmentIds | None = None,
) -> tuple[Readable, KVCache]:
    """The first half of `cached_attention`: what queries of the new tokens read, and the cache with these.

    `readable.read(q, **options)` is the second half. Any number of layers may do so, with windows up to this one.
    """
    _check_cache(k, v, cache, window)
    batch, length = k.shape[:2]
    checks.check_segment_ids(segment_ids, batch, length)
    if length == 0:
        return Row(k, v, segment_ids), cache
    if segment_ids is None:
        ids = jnp.broadcast_to(cache.segment[:, None], (batch, length))
    else:
        ids = jnp.asarray(segment_ids, cache.segment_ids.dtype)
        k, v = real_only(k, ids), real_only(v, ids)
    new = _stored(k, v, jnp.where(ids >= 0, ids, -1), cache)
    if length == 1:
        cache = _append(cache, new, cache.length % cache.k.shape[1])
        slots = cache.k, cache.v, cache.segment_ids
        return Slots(*slots, ids, cache.length - 1, cache.k_scale, cache.v_scale), cache
    if window is None:
        offset = cache.length
        cache = _append(cache, new, offset)
        keys, values = _floats(_parts(cache), k.dtype)
        return Prefix(keys, values, cache.segment_ids, ids, offset), cache
    past, cache = _append_to_ring(cache, new, window)
    keys, values = _floats(past, k.dtype)
    return Prefix(keys, values, past.segment_ids, ids, None), cache


class Parts(NamedTuple):
    """What a cache holds of tokens: [B, tokens, ...]."""

    k: Array
    v: Array
    segment_ids: Array
    k_scale: Array | None
    v_scale: Array | None


def _parts(cache: KVCache) -> Parts:
    return Parts(cache.k, cache.v, cache.segment_ids, cache.k_scale, cache.v_scale)


def _stored(k: Array, v: Array, ids: Int[Array, "B T"], cache: KVCache) -> Parts:
    """New tokens as the cache keeps them."""
    if cache.k_scale is None:
        return Parts(k.astype(cache.k.dtype), v.astype(cache.v.dtype), ids, None, None)
    (k, k_scale), (v, v_scale) = quantised(k), quantised(v)
    return Parts(k, v, ids, k_scale, v_scale)


def _floats(parts: Parts, dtype: Any) -> tuple[Array, Array]:
    """Keys and values to compute with."""
    if parts.k_scale is None or parts.v_scale is None:
        return parts.k, parts.v
    return dequantised(parts.k, parts.k_scale, dtype), dequantised(parts.v, parts.v_scale, dtype)


def _with(cache: KVCache, parts: Parts, new: Parts) -> KVCache:
    length, segment = cache.length + new.k.shape[1], _last_document(cache, new.segment_ids)
    return KVCache(parts.k, parts.v, parts.segment_ids, length, segment, parts.k_scale, parts.v_scale)


def _append(cache: KVCache, new: Parts, slot: Array) -> KVCache:
    write = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, slot, axis=1)  # noqa: E731
    return _with(cache, jax.tree.map(write, _parts(cache), new), new)


def _append_to_ring(cache: KVCache, new: Parts, window: int) -> tuple[Parts, KVCache]:
    """What the new tokens read, in order of position, and the ring with the last S tokens.

    The old tokens are taken out before the new ones overwrite their slots.
    """
    capacity = cache.k.shape[1]
    total = cache.length + new.k.shape[1]
    # the ring from its oldest slot on is in order of position, and back
    join = lambda old, x: jnp.concatenate([jnp.roll(old, -cache.length, 1), x], 1)  # noqa: E731
    rows = jax.tree.map(join, _parts(cache), new)
    ring = jax.tree.map(lambda x: jnp.roll(x[:, -capacity:], total, 1), rows)
    return jax.tree.map(lambda x: x[:, capacity - (window - 1) :], rows), _with(cache, ring, new)


def _last_document(cache: KVCache, ids: Int[Array, "B T"]) -> Int[Array, " B"]:
    last = jnp.max(ids, axis=1)
    return jnp.where(last >= 0, last, cache.segment)


def _check_cache(k: Array, v: Array, cache: KVCache, window: int | None) -> None:
    batch, length = k.shape[:2]
    checks.check_shape("cache.k", cache.k, (batch, None, *k.shape[2:]), "[B, S, G, K]")
    capacity = cache.k.shape[1]
    checks.check_shape("cache.v", cache.v, (batch, capacity, *v.shape[2:]), "[B, S, G, V]")
    if window is not None:
        if capacity < window:
            checks.fail("cache", f"a capacity of {capacity} tokens", f"at least the window of {window}")
    elif length > capacity:
        checks.fail("k", f"{length} tokens", f"at most the cache's capacity of {capacity}")
    elif not isinstance(cache.length, jax.core.Tracer) and int(cache.length) + length > capacity:
        checks.fail("k", f"{length} tokens", f"at most {capacity - int(cache.length)}, the free slots of the cache")
