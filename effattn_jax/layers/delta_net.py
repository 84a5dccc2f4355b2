"""DeltaNet: a memory that corrects what it holds under a key (Yang et al. 2024, arXiv:2406.06484)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.delta_layer import DeltaLayer
from effattn_jax.layers.l2_norm import l2_norm
from effattn_jax.layers.projection import Projection
from effattn_jax.linear import delta_rule
from effattn_jax.typing import Array, Float, Hidden, MatrixState, SegmentIds, Values

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "elu": lambda x: jax.nn.elu(x) + 1,
    "identity": lambda x: x,
}


def sum_norm(x: Float[Array, "*batch K"], eps: float = 1e-6) -> Float[Array, "*batch K"]:
    """x / (sum x + eps) of features that are not negative (Schlag et al. 2021, arXiv:2102.11174), in float32."""
    y = x.astype(jnp.float32)
    return (y / (jnp.sum(y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class DeltaNet(DeltaLayer):
    """q, k, v pass a short convolution and an activation, q and k a norm; beta = sigmoid(W_b x); for every head h

        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,   o_t = K^{-1/2} S_t^T q_t
        output = W_o RMSNorm(o)

    which is `delta_rule` without a decay.

    Args:
      heads: of queries, keys and values, each of `head_dim` channels; a value head has expand_v * head_dim.
      qk_activation: f of queries and keys: "silu", "relu", "elu" (which is elu(x) + 1) or "identity".
      qk_norm: "l2" (length one) or "sum" (sum one, for activations that are not negative: "relu" or "elu").
      allow_negative_eigenvalues: beta in (0, 2), so that a key can turn its row of the memory around (Grazzi et al.
        2024, arXiv:2411.12537).
      output_gate: the normed o is multiplied by silu(W_g x).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 16,
        head_dim: int = 128,
        expand_v: float = 1.0,
        conv_width: int = 4,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        allow_negative_eigenvalues: bool = False,
        output_gate: bool = False,
        norm_eps: float = 1e-5,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        if qk_activation not in ACTIVATIONS:
            checks.fail("qk_activation", repr(qk_activation), f"one of {', '.join(ACTIVATIONS)}")
        if qk_norm not in ("l2", "sum"):
            checks.fail("qk_norm", repr(qk_norm), "one of l2, sum")
        if qk_norm == "sum" and qk_activation not in ("relu", "elu"):
            checks.fail("qk_norm", f"'sum' after {qk_activation!r}", "features that are not negative: relu or elu")
        super().__init__(
            dim,
            heads=heads,
            value_heads=None,
            head_dim=head_dim,
            expand_v=expand_v,
            conv_width=conv_width,
            norm_eps=norm_eps,
            qk_activation=ACTIVATIONS[qk_activation],
            dtype=dtype,
            implementation=implementation,
            rngs=rngs,
        )
        self.qk_norm, self.largest_beta = qk_norm, 2 if allow_negative_eigenvalues else 1
        self.b_proj = Projection(dim, heads, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.g_proj = Projection(dim, self.inner, ("embed", "heads"), dtype=dtype, rngs=rngs) if output_gate else None

    def recur(
        self, x: Hidden, q: Array, k: Array, v: Array, memory: MatrixState | None, segment_ids: SegmentIds | None
    ) -> tuple[Values, MatrixState]:
        norm = l2_norm if self.qk_norm == "l2" else sum_norm
        beta = self.largest_beta * jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))
        return delta_rule(
            norm(q),
            norm(k),
            v,
            beta,
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
