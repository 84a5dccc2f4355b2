"""Rotary embedding in the dtype of its input, for functions that take a rotation."""

import jax.numpy as jnp


def rotary(x, positions):
    """x [B, T, H, K] at positions [B, T]; channels i and i + K / 2 are a pair."""
    frequencies = 10_000.0 ** jnp.linspace(0, -1, x.shape[-1] // 2, endpoint=False)
    turn = jnp.exp(1j * (positions[..., None, None] * frequencies))
    pairs = jnp.split(x, 2, axis=-1)
    turned = (pairs[0] + 1j * pairs[1]) * turn
    return jnp.concatenate([turned.real, turned.imag], axis=-1).astype(x.dtype)
