"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.typing import Array, Float


class RMSNorm(nnx.Module):
    """y = w * x / sqrt(mean(x^2) + eps), the mean over each of `groups` equal parts of the last axis; in float32.

    Without `affine` there is no w; with `about_one` the parameter is w - 1, and weight decay pulls w to 1 (Gemma).
    """

    def __init__(
        self,
        dim: int,
        *,
        groups: int = 1,
        affine: bool = True,
        about_one: bool = False,
        eps: float = 1e-6,
        axis: str = "embed",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        checks.check_head_groups("groups", groups, "dim", dim)
        start = jnp.zeros if about_one else jnp.ones
        self.scale = nnx.Param(start((dim,), jnp.float32), axes=(axis,)) if affine else None
        self.groups, self.about_one, self.eps, self.dtype = groups, about_one, eps, dtype

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
        grouped *= jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=-1, keepdims=True) + self.eps)
        y = grouped.reshape(x.shape)
        if self.scale is None:
            return y.astype(self.dtype)
        scale = self.scale[...].astype(jnp.float32)
        return (y * (1 + scale if self.about_one else scale)).astype(self.dtype)
