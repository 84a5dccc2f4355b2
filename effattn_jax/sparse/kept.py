"""Caches that keep some of the tokens: the kept keys and values of each key head, side by side."""

import jax.numpy as jnp

from effattn_jax.typing import Array, Float, Int


def pick(x: Float[Array, "B M G K"], tokens: Int[Array, "B G n"]) -> Float[Array, "B n G K"]:
    """The tokens of each key head."""
    return jnp.take_along_axis(x, jnp.moveaxis(tokens, 1, 2)[..., None], axis=1)


def to_slots(x: Array, slots: int, fill: int = 0) -> Array:
    """[B, n, ...] -> [B, slots, ...], filled up behind."""
    return jnp.pad(x, ((0, 0), (0, slots - x.shape[1]), *((0, 0),) * (x.ndim - 2)), constant_values=fill)


def of_groups(x: Float[Array, "B H M"], groups: int) -> Float[Array, "B G M"]:
    """Sums over the heads that share keys."""
    return jnp.sum(x.reshape(x.shape[0], groups, -1, x.shape[2]), axis=2)
