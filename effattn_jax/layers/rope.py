"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

import jax.numpy as jnp

from effattn_jax.typing import Array, Float, Positions


def rope(
    x: Float[Array, "B T H K"], positions: Positions, *, theta: float = 10_000.0, fraction: float = 1.0
) -> Float[Array, "B T H K"]:
    """Rotate the pairs (x_i, x_{i + R/2}) of the first R = fraction * K channels by position * theta^{-2 i / R}."""
    rotated = int(x.shape[-1] * fraction) // 2 * 2
    frequencies = theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x[..., :rotated].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., rotated:]], axis=-1)
