"""How gates and steps start."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from effattn_jax.typing import Array


def log_uniform(key: Array, shape: Sequence[int], low: float, high: float) -> Array:
    """Numbers between `low` and `high`, uniform in their logarithm."""
    return jnp.exp(jax.random.uniform(key, shape, jnp.float32, jnp.log(low), jnp.log(high)))


def inverse_softplus(x: Array) -> Array:
    return x + jnp.log(-jnp.expm1(-x))


def dt_bias(key: Array, shape: Sequence[int], low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Array:
    """Biases under which steps softplus(bias) start between `low` and `high`, uniform in their logarithm (Mamba)."""
    return inverse_softplus(jnp.maximum(log_uniform(key, shape, low, high), floor))


def log_of_uniform(key: Array, shape: Sequence[int], low: float, high: float) -> Array:
    """A_log of Mamba-2 and the gated delta rules: the logarithm of uniform numbers between `low` and `high`."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, low, high))
