"""PaTH attention over a cache: every new token carries all keys before it on by its step."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.precision import contract
from effattn_jax.sparse.mask import same_document
from effattn_jax.sparse.path import BLOCK, block_steps, check_path, merge, softmax_part, to_blocks
from effattn_jax.typing import Array, Bool, Float, Int, SegmentIds


class PathCache(NamedTuple):
    """Keys carried on to the last token, their values and documents; S slots in order."""

    k: Float[Array, "B S H K"]
    v: Float[Array, "B S H V"]
    forget: Float[Array, "B S H"]  # sum of log_forget since the token of the slot
    segment_ids: Int[Array, "B S"]  # -1: unused, or padding
    length: Int[Array, ""]


def init_path_cache(batch: int, capacity: int, heads: int, key_dim: int, value_dim: int) -> PathCache:
    """An empty cache in float32: every step rotates all keys again, so roundings add up."""
    return PathCache(
        jnp.zeros((batch, capacity, heads, key_dim), jnp.float32),
        jnp.zeros((batch, capacity, heads, value_dim), jnp.float32),
        jnp.zeros((batch, capacity, heads), jnp.float32),
        jnp.full((batch, capacity), -1, jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def cached_path_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    w: Float[Array, "B T G K"],
    beta: Float[Array, "B T G"],
    cache: PathCache,
    segment_ids: SegmentIds,
    *,
    log_forget: Float[Array, "B T H"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T H V"], PathCache]:
    """`path_attention` of T new tokens over the cache and themselves, and the cache with them: blocks one after the
    other, each carrying all keys on by its steps. `segment_ids` are needed here; they continue those of the cache."""
    check_path(q, k, v, w, beta, log_forget, segment_ids)
    batch, length, heads, key_dim = q.shape
    capacity = cache.k.shape[1]
    used = None if isinstance(cache.length, jax.core.Tracer) else int(cache.length)
    if length > capacity - (used or 0):
        checks.fail("k", f"{length} tokens", f"at most {capacity - (used or 0)}, the free slots of the cache")
    if length == 0:
        return jnp.zeros_like(q, shape=(batch, 0, heads, v.shape[-1])), cache
    scale = key_dim**-0.5 if scale is None else scale
    forget = jnp.zeros_like(q, shape=q.shape[:3]) if log_forget is None else log_forget
    size = math.gcd(length, BLOCK)
    real = segment_ids >= 0
    tokens = [jnp.where(real[..., None, None], x, 0) for x in (q * scale, k, v, w)]
    tokens += [jnp.where(real[..., None], x, 0) for x in (beta, forget)]
    tokens = [jnp.repeat(x.astype(jnp.float32), heads // x.shape[2], axis=2) for x in tokens]
    blocks = [to_blocks(x, length // size, size) for x in tokens]
    ids = jnp.where(real, segment_ids, -1).reshape(batch, -1, size).swapaxes(0, 1)

    def block(cache: PathCache, rows: tuple[Array, ...]) -> tuple[PathCache, Array]:
        q, k, v, w, beta, forget, ids = rows
        steps = block_steps(q, k, w, beta)
        kept = jnp.cumsum(forget, -1)  # [B, H, C]
        causal = jnp.tril(jnp.ones((size, size), bool))
        inside = steps.inside + jnp.where(causal, kept[..., :, None] - kept[..., None, :], 0)
        own = causal & same_document(ids[:, :, None], ids[:, None, :])
        past = contract("bhik,bshk->bhis", steps.back, cache.k)
        past += kept[..., :, None] + jnp.moveaxis(cache.forget, 1, 2)[..., None, :]
        seen = same_document(ids[:, :, None], cache.segment_ids[:, None, :])
        part = merge(
            softmax_part(_masked(inside, own), v), softmax_part(_masked(past, seen), jnp.moveaxis(cache.v, 1, 2))
        )
        out = part.weighted / jnp.where(part.total == 0, 1, part.total)[..., None]
        carried = cache._replace(
            k=contract("bhkl,bshl->bshk", steps.whole, cache.k), forget=cache.forget + kept[:, None, :, -1]
        )
        new = (steps.on, v, kept[..., -1:] - kept, ids)
        return _append(carried, new), jnp.moveaxis(out, 1, 2)

    cache, out = jax.lax.scan(block, cache, (*blocks, ids))
    return jnp.moveaxis(out, 0, 1).reshape(batch, length, heads, -1).astype(q.dtype), cache


def _masked(scores: Float[Array, "B H C M"], mask: Bool[Array, "B C M"]) -> Float[Array, "B H C M"]:
    return jnp.where(mask[:, None], scores, -jnp.inf)


def _append(cache: PathCache, new: tuple[Array, Array, Array, Array]) -> PathCache:
    k, v, forget, ids = new
    rows = (jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), jnp.moveaxis(forget, 1, 2), ids)
    k, v, forget, ids = (
        jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), cache.length, axis=1)
        for old, x in zip(cache[:4], rows, strict=True)
    )
    return PathCache(k, v, forget, ids, cache.length + new[3].shape[1])
