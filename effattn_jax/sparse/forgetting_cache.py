"""Forgetting attention over a cache: keys, values, and how much has been forgotten since each of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.precision import contract
from effattn_jax.sparse.documents import real_only
from effattn_jax.sparse.forgetting import STEPS, ForgetSum, attend, check_forgetting, forget_sum
from effattn_jax.sparse.mask import same_document
from effattn_jax.sparse.path import softmax_part
from effattn_jax.typing import Array, Bool, Float, Int, Queries, SegmentIds

LIMIT = 2**30 - 1  # steps at which a sum stops growing: nothing is left of what is that far back


class ForgettingCache(NamedTuple):
    """S slots in the order of the tokens."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    steps: Int[Array, "B S H"]  # these and `fine` are the `ForgetSum` F_j - F_last: the gates after slot j, negated
    fine: Float[Array, "B S H"]
    segment_ids: Int[Array, "B S"]  # document of each slot; -1 is an unused slot or padding
    length: Int[Array, ""]  # tokens appended so far, padding included
    segment: Int[Array, " B"]  # document of the last real token of each row


def init_forgetting_cache(
    batch: int,
    capacity: int,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    dtype: Any = jnp.bfloat16,
) -> ForgettingCache:
    """An empty cache of `capacity` tokens; `heads` are those of the queries, `dtype` that of keys and values."""
    return ForgettingCache(
        k=jnp.zeros((batch, capacity, kv_heads, key_dim), dtype),
        v=jnp.zeros((batch, capacity, kv_heads, key_dim if value_dim is None else value_dim), dtype),
        steps=jnp.zeros((batch, capacity, heads), jnp.int32),
        fine=jnp.zeros((batch, capacity, heads), jnp.float32),
        segment_ids=jnp.full((batch, capacity), -1, jnp.int32),
        length=jnp.zeros((), jnp.int32),
        segment=jnp.zeros((batch,), jnp.int32),
    )


def cached_forgetting_attention(
    q: Queries,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    log_forget: Float[Array, "B T H"],
    cache: ForgettingCache,
    *,
    scale: float | None = None,
    segment_ids: SegmentIds | None = None,
) -> tuple[Float[Array, "B T H V"], ForgettingCache]:
    """`forgetting_attention` of T new tokens over the tokens in the cache and themselves; they are appended to it.

    Any split of a sequence into calls gives what one call gives (with k and v in the cache's dtype). Sums of gates are
    kept from the last token back, so that they do not grow with the number of tokens read.

    Args:
      q, k, v, log_forget, scale: see `forgetting_attention`.
      cache: what `init_forgetting_cache` or the last call returned; its capacity is the most tokens that fit in all.
      segment_ids: [B, T] documents of the new tokens; None: they continue that of the row's last real token.

    Returns:
      out [B, T, H, V] in q's dtype, and the cache with the tokens.

    Raises:
      ValueError: what `forgetting_attention` raises; a cache of other sizes or without room.
    """
    check_forgetting(q, k, v, log_forget, segment_ids)
    batch, length, heads = q.shape[:3]
    capacity = cache.k.shape[1]
    checks.check_shape("cache.k", cache.k, (batch, None, *k.shape[2:]), "[B, S, G, K]")
    checks.check_shape("cache.steps", cache.steps, (batch, capacity, heads), "[B, S, H]")
    used = 0 if isinstance(cache.length, jax.core.Tracer) else int(cache.length)
    if used + length > capacity:
        checks.fail("k", f"{length} tokens", f"at most {capacity - used}, the free slots of the cache")
    if length == 0:
        return jnp.zeros_like(q, shape=(*q.shape[:3], v.shape[-1])), cache
    if segment_ids is None:
        ids = jnp.broadcast_to(cache.segment[:, None], (batch, length))
    else:
        ids = jnp.asarray(segment_ids, jnp.int32)
        q, k, v, log_forget = (real_only(x, ids) for x in (q, k, v, log_forget))

    new = forget_sum(log_forget.astype(cache.fine.dtype))
    last = ForgetSum(new.steps[:, -1:], new.fine[:, -1:])
    steps = jnp.minimum(cache.steps - jnp.maximum(last.steps, -LIMIT), LIMIT)
    append = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), cache.length, axis=1)  # noqa: E731
    newest, start = jnp.max(ids, axis=1), cache.length
    cache = ForgettingCache(
        k=append(cache.k, k),
        v=append(cache.v, v),
        steps=append(steps, new.steps - last.steps),
        fine=append(cache.fine - last.fine, new.fine - last.fine),
        segment_ids=append(cache.segment_ids, jnp.where(ids >= 0, ids, -1)),
        length=cache.length + length,
        segment=jnp.where(newest >= 0, newest, cache.segment),
    )
    old = ForgetSum(cache.steps, cache.fine)
    if length == 1:
        return _read(q, cache.k, cache.v, old, same_document(ids, cache.segment_ids), scale), cache
    sums = ForgetSum(new.steps - last.steps, new.fine - last.fine)
    return attend(q, cache.k, cache.v, sums, old, ids, cache.segment_ids, offset=start, scale=scale), cache


def _read(
    q: Float[Array, "B 1 H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    sums: ForgetSum,
    mask: Bool[Array, "B S"],
    scale: float | None,
) -> Float[Array, "B 1 H V"]:
    """The last token reads all slots at once; its own sum is 0."""
    batch, _, heads, key_dim = q.shape
    shape = (k.shape[2], heads // k.shape[2])
    forgotten = jnp.moveaxis(sums.fine + sums.steps / STEPS, 1, 2).reshape(batch, *shape, -1)
    logits = contract("bgrk,bsgk->bgrs", q.reshape(batch, *shape, key_dim), k)
    logits = logits * (key_dim**-0.5 if scale is None else scale) - forgotten
    part = softmax_part(jnp.where(mask[:, None, None], logits, -jnp.inf), jnp.moveaxis(v, 1, 2).astype(logits.dtype))
    out = part.weighted / jnp.where(part.total == 0, 1, part.total)[..., None]
    return out.reshape(batch, 1, heads, -1).astype(q.dtype)
