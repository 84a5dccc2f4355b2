"""Kimi Delta Attention: a gated delta rule that forgets per channel (Kimi Linear, 2025, arXiv:2510.26692)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax.dispatch import Implementation
from effattn_jax.layers.decay_gate import DecayGate
from effattn_jax.layers.delta_layer import DeltaLayer
from effattn_jax.layers.l2_norm import l2_norm
from effattn_jax.layers.low_rank import LowRank
from effattn_jax.layers.projection import Projection
from effattn_jax.linear import delta_rule
from effattn_jax.typing import Array, Hidden, MatrixState, SegmentIds, Values


class KimiDeltaAttention(DeltaLayer):
    """q, k, v pass a short convolution and silu, q and k have length one; beta = sigmoid(W_b x); for every head h

        g = -e^{A_log} softplus(W_f W_f' x + dt_bias)                      [K], A_log per head, dt_bias per channel
        S_t = (I - beta_t k_t k_t^T) diag(e^{g_t}) S_{t-1} + beta_t k_t v_t^T,   o_t = K^{-1/2} S_t^T q_t
        output = W_o (RMSNorm(o) * sigmoid(W_g W_g' x))

    which is `delta_rule` with a decay per channel. Both gates go through few channels.

    Args:
      heads: of queries and keys, each of `head_dim` channels.
      value_heads: of values, each of expand_v * head_dim channels, and of the memory; None means `heads`.
      gate_rank: channels the gates go through; None means those of a value head.
      gate_bias: the output gate has a bias.
      lower_bound: None, or a number b < 0 such as -5: g = b sigmoid(e^{A_log} (W_f W_f' x + dt_bias)) stays above it.
      allow_negative_eigenvalues: beta in (0, 2) (Grazzi et al. 2024, arXiv:2411.12537).
    """

    gate_activation = staticmethod(jax.nn.sigmoid)

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 16,
        value_heads: int | None = None,
        head_dim: int = 128,
        expand_v: float = 1.0,
        conv_width: int = 4,
        gate_rank: int | None = None,
        gate_bias: bool = False,
        lower_bound: float | None = None,
        allow_negative_eigenvalues: bool = False,
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
        rank, decays = gate_rank or self.value_head_dim, self.value_heads * head_dim
        self.largest_beta = 2 if allow_negative_eigenvalues else 1
        self.b_proj = Projection(dim, self.value_heads, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.f_proj = LowRank(dim, rank, decays, dtype=dtype, rngs=rngs)
        self.decay = DecayGate(self.value_heads, head_dim, lower_bound=lower_bound, rngs=rngs)
        self.g_proj = LowRank(dim, rank, self.inner, bias=gate_bias, dtype=dtype, rngs=rngs)

    def recur(
        self, x: Hidden, q: Array, k: Array, v: Array, memory: MatrixState | None, segment_ids: SegmentIds | None
    ) -> tuple[Values, MatrixState]:
        return delta_rule(
            l2_norm(q),
            l2_norm(k),
            v,
            self.largest_beta * jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32)),
            self.decay(self.f_proj(x)),
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
