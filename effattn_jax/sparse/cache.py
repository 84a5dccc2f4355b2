"""Keys and values of the past, for decoding: a buffer of fixed capacity, or with a window a ring of the last tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.attention import AttentionOut, attend, check
from effattn_jax.sparse.documents import real_only
from effattn_jax.sparse.mask import Band, same_document
from effattn_jax.sparse.single_token import read
from effattn_jax.typing import Array, Bool, Float, Int, Queries, SegmentIds


class KVCache(NamedTuple):
    """S slots per row; the token at position p (from 0, padding counted) is in slot p mod S."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    segment_ids: Int[Array, "B S"]  # document of each slot; -1 is an unused slot or padding, never read
    length: Int[Array, ""]  # tokens appended so far, padding included
    segment: Int[Array, " B"]  # document of the last real token of each row


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
      dtype: of keys and values.
    """
    sizes = {"batch": batch, "capacity": capacity, "kv_heads": kv_heads, "key_dim": key_dim}
    for name, size in sizes.items():
        if size < 1:
            checks.fail(name, size, "at least 1")
    return KVCache(
        k=jnp.zeros((batch, capacity, kv_heads, key_dim), dtype),
        v=jnp.zeros((batch, capacity, kv_heads, key_dim if value_dim is None else value_dim), dtype),
        segment_ids=jnp.full((batch, capacity), -1, jnp.int32),
        length=jnp.zeros((), jnp.int32),
        segment=jnp.zeros((batch,), jnp.int32),
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
    _check_cache(q, k, v, cache, window)
    batch, length = q.shape[:2]
    checks.check_segment_ids(segment_ids, batch, length)
    if length == 0:
        return jnp.zeros_like(q, shape=(*q.shape[:3], v.shape[-1])), cache
    if segment_ids is None:
        ids = jnp.broadcast_to(cache.segment[:, None], (batch, length))
    else:
        ids = jnp.asarray(segment_ids, cache.segment_ids.dtype)
        q, k, v = (real_only(x, ids) for x in (q, k, v))
    new = (k.astype(cache.k.dtype), v.astype(cache.v.dtype), jnp.where(ids >= 0, ids, -1))
    options: dict[str, Any] = {
        "sinks": sinks,
        "scale": scale,
        "logits_soft_cap": logits_soft_cap,
        "implementation": implementation,
    }
    if length == 1:
        cache = _append(cache, new, cache.length % cache.k.shape[1])
        mask = _readable(cache, ids, window)
        return read(q, cache.k, cache.v, mask, **options), cache

    offset: int | Array
    if window is None:
        offset = cache.length
        cache = _append(cache, new, offset)
        keys, values, segments = cache.k, cache.v, cache.segment_ids
    else:
        keys, values, segments, cache = _append_to_ring(cache, new, window)
        offset = keys.shape[1] - length
    out, _ = attend(
        q,
        keys,
        values,
        offset=offset,
        causal=True,
        window=window,
        query_segments=ids,
        key_segments=segments,
        return_lse=False,
        **options,
    )
    return out, cache


def _append(cache: KVCache, new: tuple[Array, Array, Array], slot: Array) -> KVCache:
    k, v, segments = (
        jax.lax.dynamic_update_slice_in_dim(old, x, slot, axis=1) for old, x in zip(cache[:3], new, strict=True)
    )
    return KVCache(k, v, segments, cache.length + new[0].shape[1], _last_document(cache, new[2]))


def _append_to_ring(
    cache: KVCache, new: tuple[Array, Array, Array], window: int
) -> tuple[Array, Array, Array, KVCache]:
    """Keys, values and documents that the new tokens read, in order of position, and the ring with the last S tokens.

    The old tokens are taken out before the new ones overwrite their slots.
    """
    capacity, length = cache.k.shape[1], new[0].shape[1]
    total = cache.length + length
    # the ring from its oldest slot on is in order of position, and back
    rows = [jnp.concatenate([jnp.roll(old, -cache.length, 1), x], 1) for old, x in zip(cache[:3], new, strict=True)]
    k, v, segments = (jnp.roll(x[:, -capacity:], total, 1) for x in rows)
    keys, values, documents = (x[:, capacity - (window - 1) :] for x in rows)
    return keys, values, documents, KVCache(k, v, segments, total, _last_document(cache, new[2]))


def _last_document(cache: KVCache, ids: Int[Array, "B T"]) -> Int[Array, " B"]:
    last = jnp.max(ids, axis=1)
    return jnp.where(last >= 0, last, cache.segment)


def _readable(cache: KVCache, ids: Int[Array, "B 1"], window: int | None) -> Bool[Array, "B S"]:
    """The slots that the token just appended may read."""
    last = cache.length - 1
    age = (last - jnp.arange(cache.k.shape[1])) % cache.k.shape[1]  # tokens since the slot was written
    return Band(True, window)(last, last - age) & same_document(ids, cache.segment_ids)


def _check_cache(q: Array, k: Array, v: Array, cache: KVCache, window: int | None) -> None:
    batch, length = q.shape[:2]
    checks.check_shape("k", k, (batch, length, None, None), "[B, T, G, K]")
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
