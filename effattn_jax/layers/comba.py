"""Comba: a gated delta rule with a feedback vector of its own (Hu et al. 2025, arXiv:2506.02475)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax.dispatch import Implementation
from effattn_jax.layers.decay_gate import DecayGate
from effattn_jax.layers.delta_layer import DeltaLayer
from effattn_jax.layers.l2_norm import l2_norm
from effattn_jax.layers.projection import Projection
from effattn_jax.linear import dplr
from effattn_jax.linear.arguments import repeat_heads
from effattn_jax.typing import Array, Hidden, MatrixState, SegmentIds, Values


class Comba(DeltaLayer):
    """q, k, v pass a short convolution and silu; beta = sigmoid(W_b x), g = -e^{A_log} softplus(W_a x + dt_bias);

        p = sigmoid(d) k,   q <- q - D p,   q and k to length one
        S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T,   o_t = K^{-1/2} S_t^T q_t
        output = W_o (RMSNorm(o) * sigmoid(W_g x))

    for every head, which is `dplr` with a = -p, b = beta k, v = beta v. Unlike the k of Gated DeltaNet p reads the
    memory before it decays. d and D are learned, a number per head.

    Args:
      heads: of queries and keys, each of `head_dim` channels.
      value_heads: of values, each of expand_v * head_dim channels, and of the memory; None means `heads`.
      inner_decay: without it p = k.
      output_correction: D at the start, None for no correction; the authors advise 0.02 for small models.
      normalize_feedback: p to length one too, as the kernels of flash-linear-attention have it, which takes away what d
        does to it. By default it is sigmoid(d) long.
      output_gate: without it the output is W_o RMSNorm(o).
    """

    gate_activation = staticmethod(jax.nn.sigmoid)

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 6,
        value_heads: int | None = None,
        head_dim: int = 256,
        expand_v: float = 2.0,
        conv_width: int = 4,
        inner_decay: bool = True,
        output_correction: float | None = 1.0,
        normalize_feedback: bool = False,
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
        self.normalize_feedback = normalize_feedback
        self.a_proj = Projection(dim, self.value_heads, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.b_proj = Projection(dim, self.value_heads, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.decay = DecayGate(self.value_heads, slowest=0.01, rngs=rngs)
        learned = lambda start: nnx.Param(jnp.full((heads,), start, jnp.float32), axes=("heads",))  # noqa: E731
        self.d = learned(1.0) if inner_decay else None
        self.D = None if output_correction is None else learned(output_correction)
        self.g_proj = Projection(dim, self.inner, ("embed", "heads"), dtype=dtype, rngs=rngs) if output_gate else None

    def recur(
        self, x: Hidden, q: Array, k: Array, v: Array, memory: MatrixState | None, segment_ids: SegmentIds | None
    ) -> tuple[Values, MatrixState]:
        feed = lambda k: k if self.d is None else jax.nn.sigmoid(self.d[...])[:, None] * k  # noqa: E731
        unit = l2_norm(k)
        p = l2_norm(feed(k)) if self.normalize_feedback else feed(unit)
        if self.D is not None:
            q = q - self.D[...][:, None] * feed(k)
        beta = jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))[..., None]
        return dplr(
            l2_norm(q).astype(self.dtype),
            unit,
            (beta * v).astype(self.dtype),
            -p.astype(self.dtype),
            (beta * repeat_heads(unit, self.value_heads)).astype(self.dtype),
            self.decay(self.a_proj(x)),
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
