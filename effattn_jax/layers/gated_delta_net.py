"""Gated DeltaNet: the delta rule in a memory that also forgets (Yang et al. 2024, arXiv:2412.06464)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax.dispatch import Implementation
from effattn_jax.layers.decay_gate import DecayGate
from effattn_jax.layers.delta_layer import DeltaLayer
from effattn_jax.layers.l2_norm import l2_norm
from effattn_jax.layers.projection import Projection
from effattn_jax.linear import delta_rule
from effattn_jax.typing import Array, Hidden, MatrixState, SegmentIds, Values


class GatedDeltaNet(DeltaLayer):
    """q, k, v pass a short convolution and silu, q and k have length one; beta = sigmoid(W_b x); for every head h

        g = -e^{A_log} softplus(W_a x + dt_bias)
        S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - e^{g_t} S_{t-1}^T k_t)^T,   o_t = K^{-1/2} S_t^T q_t
        output = W_o (RMSNorm(o) * silu(W_g x))

    which is `delta_rule` with a decay per head.

    Args:
      heads: of queries and keys, each of `head_dim` channels.
      value_heads: of values, each of expand_v * head_dim channels, and of the memory; None means `heads`. A query and
        key head serves value_heads / heads consecutive ones (Qwen3-Next).
      allow_negative_eigenvalues: beta in (0, 2) (Grazzi et al. 2024, arXiv:2411.12537).
      output_gate: without it the output is W_o RMSNorm(o).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 6,
        value_heads: int | None = None,
        head_dim: int = 256,
        expand_v: float = 2.0,
        conv_width: int = 4,
        allow_negative_eigenvalues: bool = False,
        output_gate: bool = True,
        norm_eps: float = 1e-5,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            dim,
            heads=heads,
            value_heads=value_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            conv_width=conv_width,
            norm_eps=norm_eps,
            dtype=dtype,
            implementation=implementation,
            rngs=rngs,
        )
        self.largest_beta = 2 if allow_negative_eigenvalues else 1
        self.a_proj = Projection(dim, self.value_heads, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.b_proj = Projection(dim, self.value_heads, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.decay = DecayGate(self.value_heads, slowest=0.01, rngs=rngs)
        self.g_proj = Projection(dim, self.inner, ("embed", "heads"), dtype=dtype, rngs=rngs) if output_gate else None

    def recur(
        self, x: Hidden, q: Array, k: Array, v: Array, memory: MatrixState | None, segment_ids: SegmentIds | None
    ) -> tuple[Values, MatrixState]:
        return delta_rule(
            l2_norm(q),
            l2_norm(k),
            v,
            self.largest_beta * jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32)),
            self.decay(self.a_proj(x)),
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
