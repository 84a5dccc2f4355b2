"""Vectors of length one: keys and queries of the delta rules."""

import jax
import jax.numpy as jnp

from effattn_jax.typing import Array, Float


def l2_norm(x: Float[Array, "*batch K"], eps: float = 1e-6) -> Float[Array, "*batch K"]:
    """x / sqrt(sum x^2 + eps), in float32."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True) + eps)).astype(x.dtype)
