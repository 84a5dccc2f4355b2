"""StreamingLLM: the first tokens and the last ones, at positions inside the cache (Xiao et al. 2023, arXiv:2309.17453).

After token p the cache holds L = min(p + 1, S + R) tokens: the first S ("attention sinks") and the last R, p included.
They stand at positions 0..L-1 whatever lies between them, and the query at L - 1. So a recent key j is at the distance
p - j, as ever, and only the first tokens come nearer: min(p, S + R - 1) - j.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.sparse.attention import attend
from effattn_jax.sparse.masks import check_count
from effattn_jax.sparse.merge import merge
from effattn_jax.typing import Array, Bool, Float, Int, Queries

Rotate = Callable[[Float[Array, "B T H K"], Int[Array, "B T"]], Float[Array, "B T H K"]]


class StreamingCache(NamedTuple):
    """The first S tokens, and a ring of the last R, where the token at position p is in slot p mod R.

    Keys are stored before their rotation. What has been evicted is gone: the cache cannot be taken back to an earlier
    length, so that tokens that may be withdrawn (speculative decoding) need a copy of the cache from before them.
    """

    first_k: Float[Array, "B S G K"]
    first_v: Float[Array, "B S G V"]
    k: Float[Array, "B R G K"]
    v: Float[Array, "B R G V"]
    length: Int[Array, ""]  # tokens appended so far


def init_streaming_cache(
    batch: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    *,
    start: int = 4,
    recent: int = 512,
    dtype: Any = jnp.bfloat16,
) -> StreamingCache:
    """An empty cache of zeros.

    Args:
      batch: B, rows.
      kv_heads: G.
      key_dim: K.
      value_dim: V; None means K.
      start: S, the first tokens that stay.
      recent: R, the last tokens that stay, the query's own included.
      dtype: of keys and values.
    """
    for name, size in (("batch", batch), ("kv_heads", kv_heads), ("key_dim", key_dim), ("recent", recent)):
        check_count(name, size)
    check_count("start", start, 0)
    zeros = lambda slots, channels: jnp.zeros((batch, slots, kv_heads, channels), dtype)  # noqa: E731
    value_dim = key_dim if value_dim is None else value_dim
    return StreamingCache(
        zeros(start, key_dim),
        zeros(start, value_dim),
        zeros(recent, key_dim),
        zeros(recent, value_dim),
        jnp.zeros((), jnp.int32),
    )


def cached_streaming_attention(
    q: Queries,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    cache: StreamingCache,
    *,
    rotate: Rotate,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T H V"], StreamingCache]:
    """`streaming_attention` of T new tokens over the tokens in the cache and themselves; they are appended to it.

    Any split of a sequence into calls gives what one call gives, as if every token had come alone: a token of a chunk
    reads R recent tokens. (The published code makes room for a whole chunk first, so that its tokens read fewer.)
    T tokens cost O(T (S + R)), whatever their number so far. They are rotated by places in the call, of which there are
    R + T - 1: a long row keeps its angles exact where it comes in chunks.

    Args:
      q, k, v: [B, T, H, K], [B, T, G, K], [B, T, G, V], the new tokens, q and k before their rotation.
      cache: what `init_streaming_cache` or the last call returned.
      rotate, scale, logits_soft_cap, implementation: see `streaming_attention`.

    Returns:
      out [B, T, H, V] in q's dtype, and the cache with the tokens.

    Raises:
      ValueError: shapes, dtypes or a cache that do not fit.
    """
    check_qkv(q, k, v)
    check_numbers(scale, logits_soft_cap)
    batch, length = q.shape[:2]
    checks.check_shape("k", k, (batch, length, None, None), "[B, T, G, K]")
    for name, x, new in (("first_k", cache.first_k, k), ("k", cache.k, k), ("first_v", cache.first_v, v)):
        checks.check_shape(f"cache.{name}", x, (batch, None, *new.shape[2:]), f"[B, slots, G, {name[-1].upper()}]")
    checks.check_shape("cache.v", cache.v, (batch, cache.k.shape[1], *v.shape[2:]), "[B, R, G, V]")
    if length == 0:
        return jnp.zeros_like(q, shape=(*q.shape[:3], v.shape[-1])), cache
    recent, total = cache.k.shape[1], cache.length + length
    k, v = k.astype(cache.k.dtype), v.astype(cache.v.dtype)
    # the ring from its oldest slot on is in order of position, and back
    rows = [jnp.concatenate([jnp.roll(old, -cache.length, 1), new], 1) for old, new in ((cache.k, k), (cache.v, v))]
    first_k, first_v = _append_first(cache.first_k, k, cache.length), _append_first(cache.first_v, v, cache.length)
    read = Read(first_k, first_v, rows[0][:, 1:], rows[1][:, 1:], cache.length - recent + 1)
    options = {"scale": scale, "logits_soft_cap": logits_soft_cap, "implementation": implementation}
    out = _attend(q, read, first_k.shape[1], recent, rotate, options)
    ring_k, ring_v = (jnp.roll(x[:, -recent:], total, 1) for x in rows)
    return out, StreamingCache(first_k, first_v, ring_k, ring_v, total)


def streaming_attention(
    q: Queries,
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    *,
    rotate: Rotate,
    start: int = 4,
    recent: int = 512,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T H V"]:
    """o_p = sum_j e^{s_pj} v_j / sum_j e^{s_pj} over j < start and 0 <= p - j < recent, j <= p, each once.

    s_pj = scale * rotate(q_p, c(p)) . rotate(k_j, c(j)) with the positions c in the cache as it is after token p. Where
    nothing is evicted, M <= start + recent, that is attention with rotated queries and keys.

    Args:
      q: [B, T, H, K] queries, the last of the keys' positions, before their rotation.
      k, v: [B, M, G, K] keys before their rotation and [B, M, G, V] values, M >= T; G divides H.
      rotate: (x [B, T, H, K], positions [B, T]) -> x rotated, such as rotary position embedding. Products of rotated
        vectors must depend on the difference of their positions alone.
      start: S, the first tokens that stay.
      recent: R, the last tokens that stay, the query's own included.
      scale: factor on the logits; None means K**-0.5.
      logits_soft_cap: c, s <- c tanh(s / c). None is no cap.
      implementation: see `attention`.

    Returns:
      out [B, T, H, V] in q's dtype.

    Raises:
      ValueError: shapes, dtypes or sizes that do not fit.
    """
    check_qkv(q, k, v)
    check_numbers(scale, logits_soft_cap)
    check_count("start", start, 0)
    check_count("recent", recent)
    length, keys = q.shape[1], k.shape[1]
    if keys < length:
        checks.fail("k", f"{keys} tokens", f"at least the {length} of q, which are the last of them")
    if q.size == 0:
        return jnp.zeros_like(q, shape=(*q.shape[:3], v.shape[-1]))
    first = max(0, keys - length - recent + 1)
    read = Read(k[:, :start], v[:, :start], k[:, first:], v[:, first:], jnp.asarray(first))
    options = {"scale": scale, "logits_soft_cap": logits_soft_cap, "implementation": implementation}
    return _attend(q, read, start, recent, rotate, options)


class Read(NamedTuple):
    """What the queries of a call read."""

    first_k: Float[Array, "B S G K"]
    first_v: Float[Array, "B S G V"]
    k: Float[Array, "B M G K"]
    v: Float[Array, "B M G V"]
    position: Int[Array, ""]  # in the row, of the first of k; below 0 are none


def _attend(
    q: Queries, read: Read, start: int, recent: int, rotate: Rotate, options: dict[str, Any]
) -> Float[Array, "B T H V"]:
    """The queries are the last of `read.k`; the first tokens are read apart, at distances of their own."""
    (batch, length, _, key_dim), keys = q.shape, read.k.shape[1]
    scale = key_dim**-0.5 if options["scale"] is None else float(options["scale"])
    options = {**options, "scale": scale, "causal": True, "sinks": None, "return_lse": True}
    turn = lambda x, positions: rotate(x, jnp.broadcast_to(positions, x.shape[:2]))  # noqa: E731
    place = jnp.arange(keys)
    position = read.position + place
    is_recent = position >= start
    segments = jnp.where(is_recent, 0, -1)
    k, v = _only(read.k, is_recent), _only(read.v, is_recent)
    position = position[keys - length :]
    near = attend(
        turn(q, place[keys - length :]),
        turn(k, place),
        v,
        offset=keys - length,
        window=recent,
        query_segments=jnp.zeros((batch, length), segments.dtype),
        key_segments=jnp.broadcast_to(segments, (batch, keys)),
        **options,
    )
    slots = jnp.arange(read.first_k.shape[1])
    if not len(slots):
        return near[0]
    k, v = (_only(x, slots <= position[-1]) for x in (read.first_k, read.first_v))
    far = attend(
        turn(q, jnp.minimum(position, start + recent - 1)),
        turn(k, slots),
        v,
        offset=position[0],
        window=None,
        query_segments=None,
        key_segments=None,
        **options,
    )
    assert near[1] is not None  # for mypy: they were asked for
    assert far[1] is not None
    return merge((near[0], far[0]), (near[1], far[1]))[0]


def _only(x: Float[Array, "B S G D"], used: Bool[Array, " S"]) -> Float[Array, "B S G D"]:
    """Zeros in slots not in use, which may hold anything: 0 * NaN would reach the sums."""
    return jnp.where(used[:, None, None], x, 0)


def _append_first(old: Float[Array, "B S G D"], new: Float[Array, "B T G D"], length: Int[Array, ""]) -> Array:
    place = jnp.arange(old.shape[1]) - length  # among the new tokens
    mine = (place >= 0) & (place < new.shape[1])
    return jnp.where(mine[:, None, None], new[:, jnp.clip(place, 0, new.shape[1] - 1)], old)
