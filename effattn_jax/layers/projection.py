"""A dense projection with logical axis names, the names that `effattn_jax.training.sharding` maps to mesh axes.

embed  the residual stream     heads  channels split by heads     mlp    hidden channels of the feed-forward layer
vocab  the vocabulary          state  channels all heads share    conv   taps of a convolution
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn_jax.typing import Array, Float

LECUN = nnx.initializers.lecun_normal()


class Projection(nnx.Module):
    """y = x W (+ b), W: [in, out] float32, computed in `dtype`."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        axes: tuple[str, str],
        *,
        bias: bool = False,
        initializer: Callable[..., Array] = LECUN,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(initializer(rngs.params(), (in_dim, out_dim), jnp.float32), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_dim,), jnp.float32), axes=axes[1:]) if bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)
