"""Numbers as int8 with a scale per vector, for caches."""

from typing import Any

import jax.numpy as jnp

from effattn_jax.typing import Array, Float, Int

LARGEST = 127


def quantised(x: Float[Array, "*batch K"]) -> tuple[Int[Array, "*batch K"], Float[Array, "*batch"]]:
    """x ~ s n with s = max |x| / 127 over the last axis in float32, and n = round(x / s): off by s / 2 at most."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / LARGEST
    n = jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None])
    return n.astype(jnp.int8), scale


def dequantised(n: Int[Array, "*batch K"], scale: Float[Array, "*batch"], dtype: Any) -> Float[Array, "*batch K"]:
    return (n.astype(jnp.float32) * scale[..., None]).astype(dtype)
