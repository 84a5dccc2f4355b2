"""TTT-MLP: the memory is a network with a hidden layer that learns from every token (arXiv:2407.04620)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.ttt import TTTLayer
from effattn_jax.linear import TTTState, ttt_mlp
from effattn_jax.linear.inner_loss import Affine, Network
from effattn_jax.typing import Array


class TTTMLP(TTTLayer):
    """`TTTLinear` with f(x) = gelu(x W1 + b1) W2 + b2 in the place of x W + b, which is `ttt_mlp` (Sun et al. 2024).

    Args:
      dim, head_dim, mini_batch, backbone, conv_width, rope_theta, interleaved: see `TTTLinear`.
      base_lr: the largest step of a token, times K. The authors raise it from 0.01 to 0.1 over the first 5000 steps of
        training; here it is one number.
      expand: hidden channels for each channel of a head.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        mini_batch: int = 16,
        base_lr: float = 0.1,
        expand: int = 4,
        backbone: str = "transformer",
        conv_width: int = 4,
        rope_theta: float = 10_000.0,
        interleaved: bool = False,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        if expand < 1:
            checks.fail("expand", expand, "at least 1")
        super().__init__(
            dim,
            head_dim=head_dim,
            mini_batch=mini_batch,
            base_lr=base_lr,
            backbone=backbone,
            conv_width=conv_width,
            rope_theta=rope_theta,
            interleaved=interleaved,
            dtype=dtype,
            implementation=implementation,
            rngs=rngs,
        )
        start, hidden = nnx.initializers.normal(0.02), expand * head_dim
        draw = lambda *shape: start(rngs.params(), (self.heads, *shape), jnp.float32)  # noqa: E731
        zeros = lambda size: jnp.zeros((self.heads, size), jnp.float32)  # noqa: E731
        self.W1 = nnx.Param(draw(head_dim, hidden), axes=("heads", "head", "hidden"))
        self.b1 = nnx.Param(zeros(hidden), axes=("heads", "hidden"))
        self.W2 = nnx.Param(draw(hidden, head_dim), axes=("heads", "hidden", "head"))
        self.b2 = nnx.Param(zeros(head_dim), axes=("heads", "head"))

    def network(self) -> Network:
        return (Affine(self.W1[...], self.b1[...]), Affine(self.W2[...], self.b2[...]))

    def learn(self, q: Array, k: Array, v: Array, lr: Array, token_scale: Array, **call: Any) -> tuple[Array, TTTState]:
        weights = (self.W1[...], self.b1[...], self.W2[...], self.b2[...])
        norm = (self.ln_scale[...], self.ln_bias[...])
        return ttt_mlp(q, k, v, lr, token_scale, *weights, *norm, **call)
