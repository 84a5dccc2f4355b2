"""Layer normalisation (Ba et al. 2016, arXiv:1607.06450), over a whole vector or over each group of its channels."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.typing import Array, Float


class LayerNorm(nnx.Module):
    """y = w * (x - mean) / sqrt(var + eps) + b, mean and variance over each of `groups` equal parts; in float32.

    With a group per head it is the GroupNorm of RetNet and RWKV.
    """

    def __init__(
        self,
        dim: int,
        *,
        groups: int = 1,
        eps: float = 1e-5,
        axis: str = "embed",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        checks.check_head_groups("groups", groups, "dim", dim)
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32), axes=(axis,))
        self.groups, self.eps, self.dtype = groups, eps, dtype

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
        grouped -= jnp.mean(grouped, axis=-1, keepdims=True)
        grouped *= jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=-1, keepdims=True) + self.eps)
        return (grouped.reshape(x.shape) * self.scale[...] + self.bias[...]).astype(self.dtype)
