"""Keys and values of the last R tokens of every row: the token at position p is in slot p mod R."""

from typing import Any

import jax.numpy as jnp

from effattn_jax.sparse.attention import attention
from effattn_jax.sparse.kv_buffer import scatter, take
from effattn_jax.sparse.nsa import KV
from effattn_jax.sparse.places import Place
from effattn_jax.sparse.single_token import read
from effattn_jax.typing import Array, Float, Int, Queries


def write_ring(ring: KV, new: KV, before: Int[Array, " B"], count: Int[Array, " B"]) -> KV:
    """With the first `count` of the new tokens, which come behind `before` others."""
    slots, place = ring.k.shape[1], jnp.arange(new.k.shape[1])
    kept = (place < count[:, None]) & (place >= count[:, None] - slots)
    slot = jnp.where(kept, (before[:, None] + place) % slots, slots)
    return KV(*(scatter(old, x, slot) for old, x in zip(ring, new, strict=True)))


def read_ring(
    q: Queries,
    new: KV,
    ring: KV,
    written: KV,
    place: Place,
    before: Int[Array, " B"],
    *,
    window: int,
    scale: float | None,
) -> Float[Array, "B T H V"]:
    """Attention of T new tokens to the last `window` <= R up to themselves.

    Args:
      ring, written: without and with the new tokens.
      place: of the new tokens.
      before: tokens of each row without the new ones.
    """
    slots, length = ring.k.shape[1], q.shape[1]
    if length == 1:
        age = (place.relative - jnp.arange(slots)) % slots
        there = (age < window) & (age <= place.relative)
        options: dict[str, Any] = {"sinks": None, "logits_soft_cap": None, "implementation": None}
        return read(q, *written, jnp.broadcast_to(there, (q.shape[0], slots)), scale=scale, **options)
    position = before[:, None] - (window - 1) + jnp.arange(window - 1)
    k, v = (
        jnp.concatenate([take(old, position % slots), x.astype(old.dtype)], axis=1)
        for old, x in zip(ring, new, strict=True)
    )
    own = jnp.broadcast_to(place.relative, (q.shape[0], length))
    there = jnp.concatenate([position, own], axis=1) >= 0
    return attention(q, k, v, window=window, segment_ids=jnp.where(there, 0, -1), scale=scale)
