"""Gated DeltaProduct: several steps of the delta rule for a token (Siems et al. 2025, arXiv:2502.10297)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.decay_gate import DecayGate
from effattn_jax.layers.delta_layer import DeltaLayer
from effattn_jax.layers.l2_norm import l2_norm
from effattn_jax.layers.projection import Projection
from effattn_jax.linear import delta_rule
from effattn_jax.typing import Array, Hidden, MatrixState, SegmentIds, Values


class GatedDeltaProduct(DeltaLayer):
    """Gated DeltaNet with n keys, values and betas for a token, each from a projection and a filter of its own:

        S_0 = e^{g_t} S_{t-1},   S_j = (I - beta_j k_j k_j^T) S_{j-1} + beta_j k_j v_j^T  for j = 1 .. n,   S_t = S_n
        o_t = K^{-1/2} S_t^T q_t,   output = W_o (RMSNorm(o) * silu(W_g x))

    which is `delta_rule` on a time axis n times as long, with the decay at the first step and the query at the last.
    One reflection cannot rotate the memory; a product of two can.

    Args:
      householders: n, steps of a token.
      heads: of queries and keys, each of `head_dim` channels.
      value_heads: of values, each of expand_v * head_dim channels, and of the memory; None means `heads`.
      allow_negative_eigenvalues: beta in (0, 2): a step can reflect (Grazzi et al. 2024, arXiv:2411.12537).
      forget_gate: without it g = 0 (DeltaProduct).
      output_gate: without it the output is W_o RMSNorm(o).
    """

    def __init__(
        self,
        dim: int,
        *,
        householders: int = 2,
        heads: int = 6,
        value_heads: int | None = None,
        head_dim: int = 256,
        expand_v: float = 2.0,
        conv_width: int = 4,
        allow_negative_eigenvalues: bool = True,
        forget_gate: bool = True,
        output_gate: bool = True,
        norm_eps: float = 1e-5,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        if householders < 1:
            checks.fail("householders", householders, "at least 1 step per token")
        super().__init__(
            dim,
            heads=heads,
            value_heads=value_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            conv_width=conv_width,
            norm_eps=norm_eps,
            writes=householders,
            dtype=dtype,
            implementation=implementation,
            rngs=rngs,
        )
        self.householders, self.largest_beta = householders, 2 if allow_negative_eigenvalues else 1
        project = lambda size: Projection(dim, size, ("embed", "heads"), dtype=dtype, rngs=rngs)  # noqa: E731
        self.b_proj = project(householders * self.value_heads)
        self.a_proj = project(self.value_heads) if forget_gate else None
        self.decay = DecayGate(self.value_heads, slowest=0.01, rngs=rngs) if forget_gate else None
        self.g_proj = project(self.inner) if output_gate else None

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: n reads and writes, and the last read."""
        return (4 * self.householders + 2) * self.value_heads * self.head_dim * self.value_head_dim

    def recur(
        self, x: Hidden, q: Array, k: Array, v: Array, memory: MatrixState | None, segment_ids: SegmentIds | None
    ) -> tuple[Values, MatrixState]:
        steps, (batch, length, _) = self.householders, x.shape
        apart = lambda y: y.reshape(batch, length * steps, y.shape[2] // steps, *y.shape[3:])  # noqa: E731
        beta = self.largest_beta * jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))
        decay = None
        if self.a_proj is not None and self.decay is not None:
            decay = _among_steps(self.decay(self.a_proj(x)), steps, at=0)
        o, memory = delta_rule(
            _among_steps(l2_norm(q), steps, at=steps - 1),
            l2_norm(apart(k)),
            apart(v),
            apart(beta),
            decay,
            initial_state=memory,
            segment_ids=None if segment_ids is None else jnp.repeat(segment_ids, steps, axis=1),
            form="recurrent" if length == 1 else None,
            implementation=self.implementation,
        )
        return o[:, steps - 1 :: steps], memory


def _among_steps(x: Array, steps: int, *, at: int) -> Array:
    """[B, T, ...] -> [B, T n, ...]: at one of the n steps of its token, zeros at the others."""
    spread = jnp.zeros_like(x, shape=(*x.shape[:2], steps, *x.shape[2:])).at[:, :, at].set(x)
    return spread.reshape(x.shape[0], x.shape[1] * steps, *x.shape[2:])
