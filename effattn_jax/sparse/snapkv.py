"""SnapKV: of a prompt the cache keeps the tokens that its last queries read, and then all new ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.sparse.attention import attention
from effattn_jax.sparse.kept import of_groups, pick, to_slots
from effattn_jax.sparse.kv_buffer import check_room, check_sizes, write
from effattn_jax.sparse.last_weights import last_weights
from effattn_jax.sparse.single_token import read
from effattn_jax.sparse.top import top_entries
from effattn_jax.typing import Array, Float, Int


class SnapKVCache(NamedTuple):
    """S slots per row, of which the first `used` hold a token; rows have the same length."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    position: Int[Array, "B S G"]  # -1 is an unused slot
    used: Int[Array, ""]
    length: Int[Array, ""]  # tokens seen; the next one is at this position


def snapkv_prefill(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    room: int,
    window: int = 32,
    capacity: int = 2048,
    kernel: int = 5,
    pool: str = "avg",
    scale: float | None = None,
) -> tuple[Float[Array, "B T H V"], SnapKVCache]:
    """Causal attention of a prompt, and a cache of `capacity` of its tokens with `room` for more.

    SnapKV: Li et al. 2024, arXiv:2404.14469. See `snapkv_tokens` for the choice. Cost O(T^2), memory O(T).

    Args:
      q: [B, T, H, K]; k, v: [B, T, G, K] and [B, T, G, V]; G divides H. Keys are kept as they are, rotated where they
        are; later tokens count their positions on from T.
      room: tokens that may follow.
      window, capacity, kernel, pool: see `snapkv_tokens`.
      scale: factor on the logits; None means K**-0.5.

    Returns:
      out [B, T, H, V] in q's dtype, and the cache.

    Raises:
      ValueError: shapes, dtypes, head counts or sizes that do not fit.
    """
    check_qkv(q, k, v)
    check_numbers(scale, None)
    checks.check_shape("k", k, (q.shape[0], q.shape[1], None, None), "[B, T, G, K]")
    check_sizes(room=room)
    tokens = snapkv_tokens(q, k, window=window, capacity=capacity, kernel=kernel, pool=pool, scale=scale)
    used = tokens.shape[2]
    cache = SnapKVCache(
        to_slots(pick(k, tokens), used + room),
        to_slots(pick(v, tokens), used + room),
        to_slots(jnp.moveaxis(tokens, 1, 2), used + room, -1).astype(jnp.int32),
        jnp.asarray(used, jnp.int32),
        jnp.asarray(q.shape[1], jnp.int32),
    )
    return attention(q, k, v, scale=scale), cache


def snapkv_tokens(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B M G K"],
    *,
    window: int = 32,
    capacity: int = 2048,
    kernel: int = 5,
    pool: str = "avg",
    scale: float | None = None,
) -> Int[Array, "B G n"]:
    """The n = min(capacity, M) tokens to keep: the last `window`, and the best of those before, in ascending order.

    A token before the window has the sum of the weights that the last `window` queries have for it, pooled along the
    row over `kernel` neighbours: "avg" divides by `kernel` at the ends, too, "max" takes the greatest. Of equal scores
    the earlier token is kept.

    Heads that share keys add up their weights, so that the cache keeps one set for all of them. The paper chooses for
    every head: repeat the keys to have it so.
    """
    check_sizes(window=window, kernel=kernel)
    if kernel % 2 == 0:
        checks.fail("kernel", kernel, "an odd number")
    if capacity <= window:
        checks.fail("capacity", capacity, f"more than the window of {window}")
    if pool not in ("avg", "max"):
        checks.fail("pool", repr(pool), "'avg' or 'max'")
    keys, groups = k.shape[1:3]
    if q.shape[1] < min(window, keys):
        checks.fail("q", f"{q.shape[1]} tokens", f"at least the window of {window}")
    if keys <= capacity:
        return jnp.broadcast_to(jnp.arange(keys), (q.shape[0], groups, keys))
    score = pooled(of_groups(jnp.sum(last_weights(q, k, window, scale), axis=2), groups), window, kernel, pool)
    best = jnp.sort(top_entries(score, capacity - window), axis=-1)
    newest = jnp.broadcast_to(jnp.arange(keys - window, keys), (*best.shape[:2], window))
    return jnp.concatenate([best, newest], axis=-1)


def pooled(score: Float[Array, "B G M"], window: int, kernel: int, pool: str) -> Float[Array, "B G n"]:
    """Of the tokens before the window, which does not reach into the pools."""
    score = score[..., : score.shape[2] - window]
    begin: Any
    begin, combine = (0.0, jax.lax.add) if pool == "avg" else (-np.inf, jax.lax.max)
    begin = np.asarray(begin, score.dtype)
    result = jax.lax.reduce_window(score, begin, combine, (1, 1, kernel), (1, 1, 1), "SAME")
    return result / kernel if pool == "avg" else result


def snapkv(
    q: Float[Array, "B 1 H K"],
    k: Float[Array, "B 1 G K"],
    v: Float[Array, "B 1 G V"],
    cache: SnapKVCache,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B 1 H V"], SnapKVCache]:
    """Attention of a new token to what the cache has kept and itself; it is appended. Nothing more is dropped.

    Raises:
      ValueError: shapes that do not fit; a full cache, where its length is known.
    """
    check_qkv(q, k, v)
    check_numbers(scale, None)
    batch, slots, groups, key_dim = cache.k.shape
    checks.check_shape("q", q, (batch, 1, None, key_dim), "[B, 1, H, K] of the cache")
    checks.check_shape("k", k, (batch, 1, groups, key_dim), "[B, 1, G, K] of the cache")
    checks.check_shape("v", v, (batch, 1, groups, cache.v.shape[3]), "[B, 1, G, V] of the cache")
    check_room(cache.used, slots, 1)
    position = jax.lax.dynamic_update_slice_in_dim(
        cache.position, jnp.broadcast_to(cache.length, (batch, 1, groups)), cache.used, axis=1
    )
    cache = SnapKVCache(
        write(cache.k, k, cache.used), write(cache.v, v, cache.used), position, cache.used + 1, cache.length + 1
    )
    there = jnp.broadcast_to(jnp.arange(slots) < cache.used, (batch, slots))
    out = read(q, cache.k, cache.v, there, sinks=None, scale=scale, logits_soft_cap=None, implementation=None)
    return out, cache
