"""The cache of latent attention: per token one vector that all heads read, as key and, its first channels, as value."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.attention import attend
from effattn_jax.sparse.documents import real_only
from effattn_jax.sparse.mask import Band, same_document
from effattn_jax.sparse.single_token import read
from effattn_jax.typing import Array, Float, Int, SegmentIds


class LatentCache(NamedTuple):
    """S slots per row, filled in order."""

    latent: Float[Array, "B S R"]
    segment_ids: Int[Array, "B S"]  # document of each slot; -1 is an unused slot or padding, never read
    length: Int[Array, ""]  # tokens appended so far, padding included
    segment: Int[Array, " B"]  # document of the last real token of each row


def init_latent_cache(batch: int, capacity: int, dim: int, dtype: Any = jnp.bfloat16) -> LatentCache:
    """An empty cache for `capacity` tokens of `dim` channels."""
    return LatentCache(
        latent=jnp.zeros((batch, capacity, dim), dtype),
        segment_ids=jnp.full((batch, capacity), -1, jnp.int32),
        length=jnp.zeros((), jnp.int32),
        segment=jnp.zeros((batch,), jnp.int32),
    )


def cached_latent_attention(
    q: Float[Array, "B T H R"],
    latent: Float[Array, "B T R"],
    cache: LatentCache,
    *,
    value_dim: int,
    scale: float,
    segment_ids: SegmentIds | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T H C"], LatentCache]:
    """o_i = sum_j softmax_j(scale * q_i . l_j) l_j[:C] over the latents l of the past and of the new tokens.

    What multi-query attention is with keys l and values l[:C] (DeepSeek-V2, arXiv:2405.04434, with its projections
    absorbed into q and the output).

    Args:
      q, latent: [B, T, H, R], [B, T, R], the new tokens.
      value_dim: C.
      segment_ids: see `cached_attention`.

    Raises:
      ValueError: sizes that do not fit; a full cache.
    """
    batch, length, _, dim = q.shape
    checks.check_shape("latent", latent, (batch, length, dim), "[B, T, R]")
    checks.check_shape("cache.latent", cache.latent, (batch, None, dim), "[B, S, R]")
    checks.check_segment_ids(segment_ids, batch, length)
    capacity = cache.latent.shape[1]
    if not isinstance(cache.length, jax.core.Tracer) and int(cache.length) + length > capacity:
        checks.fail(
            "latent", f"{length} tokens", f"at most {capacity - int(cache.length)}, the free slots of the cache"
        )
    if segment_ids is None:
        ids = jnp.broadcast_to(cache.segment[:, None], (batch, length))
    else:
        ids = jnp.asarray(segment_ids, jnp.int32)
        q, latent = real_only(q, ids), real_only(latent, ids)
    offset, last = cache.length, jnp.max(ids, axis=1, initial=-1)
    put = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), offset, axis=1)  # noqa: E731
    cache = LatentCache(
        put(cache.latent, latent),
        put(cache.segment_ids, jnp.where(ids >= 0, ids, -1)),
        offset + length,
        jnp.where(last >= 0, last, cache.segment),
    )
    keys = cache.latent[:, :, None]
    values = keys[..., :value_dim]
    options: dict[str, Any] = {
        "sinks": None,
        "scale": scale,
        "logits_soft_cap": None,
        "implementation": implementation,
    }
    if length == 1:
        mask = Band(True, None)(offset, jnp.arange(capacity)) & same_document(ids, cache.segment_ids)
        return read(q, keys, values, mask, **options), cache
    out, _ = attend(
        q,
        keys,
        values,
        offset=offset,
        causal=True,
        window=None,
        query_segments=ids,
        key_segments=cache.segment_ids,
        return_lse=False,
        **options,
    )
    return out, cache
