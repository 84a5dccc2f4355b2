"""HGRN: a gated linear recurrence of channels whose memory lengthens with depth (Qin et al. 2023, arXiv:2311.04823)."""

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
from effattn_jax.linear import diagonal_scan
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds


class HGRNState(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: Float[Array, "B E"]
    document: Int[Array, " B"]


class HGRN(nnx.Module):
    """f = W_f x, i = W_i x, each of E = expand * dim channels; for every channel

        alpha_t = gamma + (1 - gamma) sigmoid(f_t)
        h_t = alpha_t h_{t-1} + (1 - alpha_t) silu(i_t)
        output = W_o (RMSNorm(h) * silu(W_g x))

    which is `diagonal_scan` with log_decay = log alpha. The lower bound gamma rises with depth: gamma_l = P_1 + ... +
    P_l, where P is the softmax over the L layers of trainable logits [L, E], so that the first layer has none and
    higher ones remember longer. (The decays are real, as in HGRN2; those of the paper also turn.)

    Args:
      dim: D.
      expand: E / D.
      lower_bound: gamma as a number in [0, 1) for all channels, in place of the trainable one.
      norm_eps: eps of the norm, which runs over all channels.
      layer_index, layer_count: l and L, the place in the stack.
      own_bounds: False in a stack that has the logits once for all its layers and hands them to `with_bounds`.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 1,
        lower_bound: float | None = None,
        norm_eps: float = 1e-5,
        layer_index: int | Array = 0,
        layer_count: int = 1,
        own_bounds: bool = True,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        if expand < 1:
            checks.fail("expand", expand, "at least 1")
        if lower_bound is not None and not 0 <= lower_bound < 1:
            checks.fail("lower_bound", lower_bound, "None or a number in [0, 1)")
        inner = expand * dim
        self.inner, self.fixed_bound = inner, lower_bound
        self.dtype, self.implementation = dtype, implementation

        project = lambda: Projection(dim, inner, ("embed", "heads"), dtype=dtype, rngs=rngs)  # noqa: E731
        self.i_proj, self.f_proj, self.g_proj = project(), project(), project()
        if lower_bound is None:
            if own_bounds:
                self.bound_logits = bound_logits(layer_count, inner)
            self.layer_index = Buffer(jnp.asarray(layer_index, jnp.float32), axes=())
        self.norm = RMSNorm(inner, eps=norm_eps, axis="heads", dtype=dtype)
        self.out_proj = Projection(inner, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    @property
    def bound_channels(self) -> int:
        """E of the logits."""
        return self.inner

    def gamma(self, logits: Float[Array, "L E"] | None = None) -> Float[Array, " E"]:
        """The lower bound of alpha, from the layer's own logits where none are given."""
        if self.fixed_bound is not None:
            return jnp.full((self.bound_channels,), self.fixed_bound, jnp.float32)
        if logits is None and not hasattr(self, "bound_logits"):
            checks.fail("bounds", None, "those of the stack, since own_bounds is False")
        return lower_bound(self.bound_logits[...] if logits is None else logits, constant(self.layer_index))

    def init_state(self, batch_size: int, max_length: int) -> HGRNState:
        """`max_length` is of no consequence here: the state has one size."""
        return HGRNState(jnp.zeros((batch_size, self.inner), jnp.float32), no_document(batch_size))

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: decay and write of every channel."""
        return 4 * self.inner

    def __call__(
        self,
        x: Hidden,
        state: HGRNState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, HGRNState | None]:
        """`positions` is of no consequence here: the recurrence knows the order."""
        return self.with_bounds(x, state, None, segment_ids=segment_ids, positions=positions)

    def with_bounds(
        self,
        x: Hidden,
        state: HGRNState | None,
        bounds: Float[Array, "L E"] | None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, HGRNState | None]:
        """The layer with the logits of the stack; None: its own."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        log_alpha = log_forget_gate(self.f_proj(x), self.gamma(bounds))
        write = -jnp.expm1(log_alpha) * jax.nn.silu(self.i_proj(x).astype(jnp.float32))
        h, memory = diagonal_scan(
            write,
            log_alpha,
            initial_state=None if state is None else state.memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = self.out_proj(self.norm(h) * jax.nn.silu(self.g_proj(x)))
        if state is None:
            return y, None
        return y, HGRNState(memory, new_document(state.document, segment_ids))
