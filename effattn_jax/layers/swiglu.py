"""Gated feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax.layers.projection import Projection
from effattn_jax.typing import Hidden


class SwiGLU(nnx.Module):
    """y = W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, dim: int, hidden_dim: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.gate = Projection(dim, hidden_dim, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.up = Projection(dim, hidden_dim, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = Projection(hidden_dim, dim, ("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Hidden) -> Hidden:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
