"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

import jax.numpy as jnp

from effattn_jax.layers.rope_scaling import RopeScaling, frequencies
from effattn_jax.typing import Array, Float, Positions


def rope(
    x: Float[Array, "B T H K"],
    positions: Positions,
    *,
    theta: float = 10_000.0,
    fraction: float = 1.0,
    scaling: RopeScaling | None = None,
    interleaved: bool = False,
) -> Float[Array, "B T H K"]:
    """Rotate the pairs (x_i, x_{i + R/2}) of the first R = fraction * K channels by position * theta^{-2 i / R}.

    Args:
      scaling: other angles, for contexts beyond training.
      interleaved: the pairs are (x_{2 i}, x_{2 i + 1}) (DeepSeek-V3, TTT).
    """
    rotated = int(x.shape[-1] * fraction) // 2 * 2
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies(theta, rotated, scaling)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    if scaling is not None and scaling.amplitude != 1:
        sin, cos = sin * scaling.amplitude, cos * scaling.amplitude
    turned = x[..., :rotated].astype(jnp.float32)
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    first, second = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        turned = jnp.stack([first, second], axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate([first, second], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., rotated:]], axis=-1)
