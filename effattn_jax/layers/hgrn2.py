"""HGRN2: a gated recurrence whose forget gate is also its key (Qin et al. 2024, arXiv:2404.07904)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.buffer import Buffer, constant
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.lower_bound import bound_logits, log_forget_gate, lower_bound
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.linear import vector_decay
from effattn_jax.typing import Array, Float, Hidden, Int, MatrixState, Positions, SegmentIds


class HGRN2State(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: MatrixState  # [B, H, K, V]
    document: Int[Array, " B"]


class HGRN2(nnx.Module):
    """q = silu(W_q x), f = W_f x, v = W_i x; for every head h

        alpha_t = gamma + (1 - gamma) sigmoid(f_t),   k_t = 1 - alpha_t
        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,   o_t = K^{-1/2} S_t^T q_t
        output = W_o RMSNorm(o)

    which is `vector_decay` with log_decay = log alpha; the norm runs over all channels. The lower bound gamma rises
    with depth: gamma_l = P_1 + ... + P_l, where P is the softmax over the L layers of trainable logits [L, D], so that
    the first layer has none and higher ones remember longer.

    Args:
      head_dim: K and V of a head; there are dim / head_dim heads.
      lower_bound: gamma as a number in [0, 1) for all channels, in place of the trainable one.
      layer_index, layer_count: l and L, the place in the stack.
      own_bounds: False in a stack that has the logits once for all its layers and hands them to `with_bounds`.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 128,
        lower_bound: float | None = None,
        norm_eps: float = 1e-5,
        layer_index: int | Array = 0,
        layer_count: int = 1,
        own_bounds: bool = True,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        if head_dim < 1 or dim % head_dim:
            checks.fail("head_dim", head_dim, f"a divisor of dim = {dim}")
        if lower_bound is not None and not 0 <= lower_bound < 1:
            checks.fail("lower_bound", lower_bound, "None or a number in [0, 1)")
        self.heads, self.head_dim, self.fixed_bound = dim // head_dim, head_dim, lower_bound
        self.dtype, self.implementation = dtype, implementation

        project = lambda: Projection(dim, dim, ("embed", "heads"), dtype=dtype, rngs=rngs)  # noqa: E731
        self.q_proj, self.f_proj, self.i_proj = project(), project(), project()
        if lower_bound is None:
            if own_bounds:
                self.bound_logits = bound_logits(layer_count, dim)
            self.layer_index = Buffer(jnp.asarray(layer_index, jnp.float32), axes=())
        self.norm = RMSNorm(dim, eps=norm_eps, axis="heads", dtype=dtype)
        self.out_proj = Projection(dim, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    @property
    def bound_channels(self) -> int:
        """D of the logits."""
        return self.heads * self.head_dim

    def gamma(self, logits: Float[Array, "L D"] | None = None) -> Float[Array, " D"]:
        """The lower bound of alpha, from the layer's own logits where none are given."""
        if self.fixed_bound is not None:
            return jnp.full((self.bound_channels,), self.fixed_bound, jnp.float32)
        if logits is None and not hasattr(self, "bound_logits"):
            checks.fail("bounds", None, "those of the stack, since own_bounds is False")
        return lower_bound(self.bound_logits[...] if logits is None else logits, constant(self.layer_index))

    def init_state(self, batch_size: int, max_length: int) -> HGRN2State:
        """`max_length` is of no consequence here: the state has one size."""
        memory = jnp.zeros((batch_size, self.heads, self.head_dim, self.head_dim), jnp.float32)
        return HGRN2State(memory, no_document(batch_size))

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: the recurrence, one write and one read."""
        return 4 * self.heads * self.head_dim * self.head_dim

    def __call__(
        self,
        x: Hidden,
        state: HGRN2State | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, HGRN2State | None]:
        """`positions` is of no consequence here: the recurrence knows the order."""
        return self.with_bounds(x, state, None, segment_ids=segment_ids, positions=positions)

    def with_bounds(
        self,
        x: Hidden,
        state: HGRN2State | None,
        bounds: Float[Array, "L D"] | None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, HGRN2State | None]:
        """The layer with the logits of the stack; None: its own."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        by_heads = lambda y: y.reshape(*x.shape[:2], self.heads, self.head_dim)  # noqa: E731
        log_alpha = log_forget_gate(self.f_proj(x), self.gamma(bounds))
        o, memory = vector_decay(
            by_heads(jax.nn.silu(self.q_proj(x))),
            by_heads(-jnp.expm1(log_alpha).astype(self.dtype)),
            by_heads(self.i_proj(x)),
            by_heads(log_alpha),
            initial_state=None if state is None else state.memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = self.out_proj(self.norm(o.reshape(x.shape)))
        if state is None:
            return y, None
        return y, HGRN2State(memory, new_document(state.document, segment_ids))
