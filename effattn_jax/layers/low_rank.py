"""A projection through few channels, for gates that depend on the data."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn_jax.layers.projection import Projection
from effattn_jax.typing import Array, Float


class LowRank(nnx.Module):
    """y = f(x W_down) W_up (+ b)."""

    def __init__(
        self,
        in_dim: int,
        rank: int,
        out_dim: int,
        *,
        activation: Callable[[Array], Array] | None = None,
        bias: bool = False,
        axis: str = "heads",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.down = Projection(in_dim, rank, ("embed", "state"), dtype=dtype, rngs=rngs)
        self.up = Projection(rank, out_dim, ("state", axis), bias=bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        y = self.down(x)
        return self.up(y if self.activation is None else self.activation(y))
