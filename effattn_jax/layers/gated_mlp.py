"""Gated feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers.projection import Projection
from effattn_jax.typing import Array, Hidden

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class GatedMLP(nnx.Module):
    """y = W_down (f(W_gate x) * W_up x).

    Args:
      dim, hidden_dim: sizes of x and of what is gated.
      activation: f, "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU; the second, with the approximation by tanh, Gemma).
      bias: of all three projections (RecurrentGemma).
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if activation not in ACTIVATIONS:
            checks.fail("activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.gate = Projection(dim, hidden_dim, ("embed", "mlp"), bias=bias, dtype=dtype, rngs=rngs)
        self.up = Projection(dim, hidden_dim, ("embed", "mlp"), bias=bias, dtype=dtype, rngs=rngs)
        self.down = Projection(hidden_dim, dim, ("mlp", "embed"), bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Hidden) -> Hidden:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


SwiGLU = GatedMLP
"""With its default activation."""
