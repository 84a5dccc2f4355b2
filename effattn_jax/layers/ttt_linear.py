"""TTT-Linear: the memory is an affine map that learns from every token (Sun et al. 2024, arXiv:2407.04620)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn_jax.dispatch import Implementation
from effattn_jax.layers.ttt import TTTLayer
from effattn_jax.linear import TTTState, ttt_linear
from effattn_jax.linear.inner_loss import Affine, Network
from effattn_jax.typing import Array


class TTTLinear(TTTLayer):
    """f(x) = x W + b for every head is trained, mini-batch by mini-batch, to send keys to values:

        loss_j = 1/2 |LN(f(k_j)) - (v_j - k_j)|^2
        (W_i, b_i) = (W, b) - token_scale_i * sum_{j <= i} lr_j grad loss_j(W, b),   o_i = q_i + LN(q_i W_i + b_i)

    which is `ttt_linear`; the next mini-batch starts from the last (W_i, b_i). See `TTTLayer` for what is around it.

    Args:
      dim: D = H K.
      head_dim: K.
      mini_batch: tokens whose gradients are taken at the same weights.
      base_lr: the largest step of a token, times K.
      backbone: "transformer" (projections of their own for q and k) or "mamba" (one projection for both, then a causal
        convolution for each, and a gate on the output).
      conv_width: taps of the convolutions.
      rope_theta: base of the rotary positions, which begin anew with every mini-batch.
      interleaved: neighbours are turned as pairs, as in the authors' checkpoints, and not halves of a head (`rope`).
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        mini_batch: int = 16,
        base_lr: float = 1.0,
        backbone: str = "transformer",
        conv_width: int = 4,
        rope_theta: float = 10_000.0,
        interleaved: bool = False,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
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
        start = nnx.initializers.normal(0.02)
        shape = (self.heads, head_dim, head_dim)
        self.W = nnx.Param(start(rngs.params(), shape, jnp.float32), axes=("heads", "head", "head"))
        self.b = nnx.Param(jnp.zeros(shape[:2], jnp.float32), axes=("heads", "head"))

    def network(self) -> Network:
        return (Affine(self.W[...], self.b[...]),)

    def learn(self, q: Array, k: Array, v: Array, lr: Array, token_scale: Array, **call: Any) -> tuple[Array, TTTState]:
        norm = (self.ln_scale[...], self.ln_bias[...])
        return ttt_linear(q, k, v, lr, token_scale, self.W[...], self.b[...], *norm, **call)
