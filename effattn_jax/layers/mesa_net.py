"""MesaNet: a memory that answers with the least-squares fit of what it has seen (von Oswald et al. 2025,
arXiv:2506.05233)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.initializers import inverse_softplus
from effattn_jax.layers.l2_norm import l2_norm
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.layers.short_convolution import ShortConvolution
from effattn_jax.linear import MesaState, mesa
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds

RIDGE_FLOOR = 0.25


class MesaNetState(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: MesaState  # [B, H, K, K] and [B, H, K, V]
    q_tail: Float[Array, "B W-1 HK"]
    k_tail: Float[Array, "B W-1 HK"]
    document: Int[Array, " B"]


class MesaNet(nnx.Module):
    """q, k = silu(conv(W x)), of length one in each head; v = W_v x; for every head h

        beta = sigmoid(W_b x + b_b),  g = log sigmoid(W_a x + b_a),  ridge = softplus(lambda) + 0.25
        H_t = e^{g_t} H_{t-1} + beta_t k_t k_t^T,   R_t = e^{g_t} R_{t-1} + beta_t k_t v_t^T
        o_t = R_t^T (H_t + diag(ridge))^-1 q_t,   output = W_o RMSNorm(o)

    which is `effattn_jax.linear.mesa`; the norm runs over each head, with one scale for all heads.

    Args:
      heads: of `head_dim` channels each, for queries, keys and values.
      conv_width: taps of the convolutions of q and k.
      iterations: of conjugate gradients; a single token is solved for exactly.
      output_gate: the normed o is multiplied by silu(W_g x).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 16,
        head_dim: int = 128,
        conv_width: int = 4,
        iterations: int = 30,
        output_gate: bool = False,
        norm_eps: float = 1e-5,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        for name, size in (("heads", heads), ("head_dim", head_dim), ("iterations", iterations)):
            if size < 1:
                checks.fail(name, size, "at least 1")
        self.heads, self.head_dim, self.iterations = heads, head_dim, iterations
        self.dtype, self.implementation = dtype, implementation

        inner = heads * head_dim
        project = lambda: Projection(dim, inner, ("embed", "heads"), dtype=dtype, rngs=rngs)  # noqa: E731
        self.q_proj, self.k_proj, self.v_proj = project(), project(), project()
        convolve = lambda: ShortConvolution(inner, conv_width, bias=False, axis="heads", dtype=dtype, rngs=rngs)  # noqa: E731
        self.q_conv, self.k_conv = convolve(), convolve()
        gate = lambda: Projection(dim, heads, ("embed", "heads"), bias=True, dtype=jnp.float32, rngs=rngs)  # noqa: E731
        self.b_proj, self.a_proj = gate(), gate()
        start = inverse_softplus(jnp.full((heads, head_dim), 1 - RIDGE_FLOOR, jnp.float32))  # a ridge of 1
        self.ridge = nnx.Param(start, axes=("heads", "head"))
        self.norm = RMSNorm(head_dim, eps=norm_eps, axis="head", dtype=jnp.float32)
        self.g_proj = project() if output_gate else None
        self.out_proj = Projection(inner, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> MesaNetState:
        """`max_length` is of no consequence here: the state has one size."""
        matrix = jnp.zeros((batch_size, self.heads, self.head_dim, self.head_dim), jnp.float32)
        return MesaNetState(
            memory=MesaState(matrix, matrix),
            q_tail=self.q_conv.init_state(batch_size),
            k_tail=self.k_conv.init_state(batch_size),
            document=no_document(batch_size),
        )

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: two writes, a product for each iteration
        and one for the first residual, and a read."""
        return 2 * (self.iterations + 4) * self.heads * self.head_dim**2

    def __call__(
        self,
        x: Hidden,
        state: MesaNetState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, MesaNetState | None]:
        """`positions` is of no consequence here: the recurrence knows the order."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        memory, q_tail, k_tail = (None, None, None) if state is None else state[:3]

        q, q_tail = self.q_conv(self.q_proj(x), q_tail, segment_ids=segment_ids)
        k, k_tail = self.k_conv(self.k_proj(x), k_tail, segment_ids=segment_ids)
        q, k, v = (y.reshape(*x.shape[:2], self.heads, self.head_dim) for y in (q, k, self.v_proj(x)))
        o, memory = mesa(
            l2_norm(q),
            l2_norm(k),
            v,
            jax.nn.sigmoid(self.b_proj(x)),
            jax.nn.log_sigmoid(self.a_proj(x)),
            jax.nn.softplus(self.ridge[...]) + RIDGE_FLOOR,
            iterations=self.iterations,
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = self.norm(o).reshape(*x.shape[:2], self.heads * self.head_dim)
        if self.g_proj is not None:
            y = y * jax.nn.silu(self.g_proj(x).astype(jnp.float32))
        y = self.out_proj(y)
        if state is None or q_tail is None or k_tail is None:
            return y, None
        return y, MesaNetState(memory, q_tail, k_tail, new_document(state.document, segment_ids))
