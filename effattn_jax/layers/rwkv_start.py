"""Where RWKV-4 to RWKV-6 start, by channel n of D and by the place of the layer in the stack.

As in the authors' training code: memories from long to short over the channels, tokens mixed less with the one before
in higher layers, and every branch silent at first (output matrices 0).
"""

import jax.numpy as jnp
from flax import nnx

from effattn_jax.typing import Array, Float

SILENT = nnx.initializers.zeros
QUIET = nnx.initializers.orthogonal(0.1)
ORTHOGONAL = nnx.initializers.orthogonal(1.0)


def height(layer_index: int | Array, layer_count: int) -> Array:
    """0 in the first layer, 1 in the last."""
    return jnp.asarray(layer_index / max(layer_count - 1, 1), jnp.float32)


def own_share(dim: int, power: float, layer_index: int | Array, layer_count: int) -> Float[Array, " D"]:
    """(n / D)^{power (1 - l / L)}: the share of a token itself, beside the one before it."""
    return (jnp.arange(dim) / dim) ** (power * jnp.asarray(1 - layer_index / layer_count, jnp.float32))


def decay(dim: int, layer_index: int | Array, layer_count: int) -> Float[Array, " D"]:
    """w_n = -6 + 5 (n / (D - 1))^{0.7 + 1.3 h}."""
    return -6 + 5 * _line(dim) ** (0.7 + 1.3 * height(layer_index, layer_count))


def bonus(dim: int, layer_index: int | Array, layer_count: int) -> Float[Array, " D"]:
    """u_n = h (1 - n / (D - 1)) + 0.1 ((n + 1) mod 3 - 1)."""
    return height(layer_index, layer_count) * (1 - _line(dim)) + 0.1 * ((jnp.arange(dim) + 1) % 3 - 1)


def decay4(dim: int, layer_index: int | Array, layer_count: int) -> Float[Array, " D"]:
    """w_n = -5 + 8 (n / (D - 1))^{0.7 + 1.3 h}, of RWKV-4."""
    return -5 + 8 * _line(dim) ** (0.7 + 1.3 * height(layer_index, layer_count))


def bonus4(dim: int) -> Float[Array, " D"]:
    """u_n = log 0.3 + 0.5 ((n + 1) mod 3 - 1), of RWKV-4."""
    return jnp.log(0.3) + 0.5 * ((jnp.arange(dim) + 1) % 3 - 1)


def norm_scale(dim: int, layer_index: int | Array, layer_count: int) -> Float[Array, " D"]:
    """((1 + l) / L)^0.7."""
    return jnp.full((dim,), ((1 + layer_index) / layer_count) ** 0.7, jnp.float32)


def _line(dim: int) -> Float[Array, " D"]:
    return jnp.arange(dim) / max(dim - 1, 1)
