"""Gated DeltaNet 2: what is erased and what is written are gated by channel, as flash-linear-attention defines it."""

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
from effattn_jax.linear import dplr
from effattn_jax.linear.arguments import repeat_heads
from effattn_jax.typing import Array, Hidden, MatrixState, SegmentIds, Values


class GatedDeltaNet2(DeltaLayer):
    """q, k, v pass a short convolution and silu, q and k have length one; for every head h

        g = -e^{A_log} softplus(W_f W_f' x + dt_bias),   b = sigmoid(W_b x)  [K],   w = sigmoid(W_w x)  [V]
        S_t = (I - k_t (b_t * k_t)^T) diag(e^{g_t}) S_{t-1} + k_t (w_t * v_t)^T,   o_t = K^{-1/2} S_t^T q_t
        output = W_o (RMSNorm(o) * sigmoid(W_g W_g' x))

    which is `dplr` with a = -e^g * b * k, b = k, v = w * v. With b = w = beta in all channels it is Kimi Delta
    Attention.

    Args:
      heads: of queries and keys, each of `head_dim` channels.
      value_heads: of values, each of expand_v * head_dim channels, and of the memory; None means `heads`.
      gate_rank: channels that g and the output gate go through; None means those of a value head.
      gate_bias: the output gate has a bias.
      lower_bound: None, or a number below 0 that g stays above, as in Kimi Delta Attention.
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
        rank, erased = gate_rank or self.value_head_dim, self.value_heads * head_dim
        self.b_proj = Projection(dim, erased, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.w_proj = Projection(dim, self.inner, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.f_proj = LowRank(dim, rank, erased, dtype=dtype, rngs=rngs)
        self.decay = DecayGate(self.value_heads, head_dim, lower_bound=lower_bound, rngs=rngs)
        self.g_proj = LowRank(dim, rank, self.inner, bias=gate_bias, dtype=dtype, rngs=rngs)

    def recur(
        self, x: Hidden, q: Array, k: Array, v: Array, memory: MatrixState | None, segment_ids: SegmentIds | None
    ) -> tuple[Values, MatrixState]:
        log_decay, k = self.decay(self.f_proj(x)), l2_norm(k)
        erase = jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32)).reshape(log_decay.shape)
        write = jax.nn.sigmoid(self.w_proj(x).astype(jnp.float32)).reshape(v.shape)
        return dplr(
            l2_norm(q),
            k,
            (write * v).astype(self.dtype),
            (-jnp.exp(log_decay) * erase * repeat_heads(k, self.value_heads)).astype(self.dtype),
            k,
            log_decay,
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
