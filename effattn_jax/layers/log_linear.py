"""Log-linear Mamba-2: a state for every scale of the past (Guo et al. 2025, arXiv:2506.04761)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.decay_gate import DecayGate
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.layers.short_convolution import ShortConvolution
from effattn_jax.linear import LogLinearState, log_linear_attention
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds


class LogLinearLayerState(NamedTuple):
    """What the layer remembers: one matrix for each level, and how many tokens it has seen."""

    memory: LogLinearState  # levels [B, H, L, N, P]
    x_tail: Float[Array, "B W-1 HP"]
    bc_tail: Float[Array, "B W-1 2GN"]
    document: Int[Array, " B"]


class LogLinear(nnx.Module):
    """`Mamba2` with a memory in log2 T parts. z, x, B, C, dt, dl = projections of the input; x, (B, C) pass a short
    convolution and silu; for every head h and level l

        dt = softplus(dt + dt_bias),  A = -e^{A_log},  lambda_t^l = softplus(L_l dl_t^l)
        y_t = sum_{s <= t} lambda_t^{l(t, s)} e^{A (dt_{s+1} + ... + dt_t)} (C_t . B_s) dt_s x_s + D x_t
        output = W_out RMSNorm(y * silu(z))

    with l(t, s) the level of s as t sees it (`effattn_jax.linear.log_linear_attention`).

    Args:
      expand: channels of the heads are expand * dim, split into heads of `head_dim`.
      state_dim: N, channels of B and C.
      groups: B and C are shared by the H / G consecutive heads of a group; the norm runs over each group's channels.
      conv_width: taps of the convolutions.
      max_length: the most tokens of a document; it has ceil(log2 max_length) + 1 levels.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        head_dim: int = 64,
        state_dim: int = 128,
        groups: int = 1,
        conv_width: int = 4,
        max_length: int = 16_384,
        norm_eps: float = 1e-5,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        inner = expand * dim
        if inner % head_dim:
            checks.fail("head_dim", head_dim, f"a divisor of expand * dim = {inner}")
        if max_length < 1:
            checks.fail("max_length", max_length, "at least 1 token")
        heads = inner // head_dim
        checks.check_head_groups("groups", groups, "the mixer", heads)
        self.heads, self.head_dim, self.state_dim, self.groups = heads, head_dim, state_dim, groups
        self.max_length, self.levels = max_length, (max_length - 1).bit_length() + 1
        self.dtype, self.implementation = dtype, implementation

        project = lambda size, axis="heads": Projection(dim, size, ("embed", axis), dtype=dtype, rngs=rngs)  # noqa: E731
        self.z_proj, self.x_proj = project(inner), project(inner)
        self.bc_proj = project(2 * groups * state_dim, "state")
        self.dt_proj, self.dl_proj = project(heads), project(heads * self.levels)
        self.x_conv = ShortConvolution(inner, conv_width, axis="heads", dtype=dtype, rngs=rngs)
        self.bc_conv = ShortConvolution(2 * groups * state_dim, conv_width, axis="state", dtype=dtype, rngs=rngs)
        self.decay = DecayGate(heads, rngs=rngs)
        self.L = nnx.Param(jnp.ones((heads, self.levels), jnp.float32), axes=("heads", "level"))
        self.D = nnx.Param(jnp.ones((heads,), jnp.float32), axes=("heads",))
        self.norm = RMSNorm(inner, groups=groups, eps=norm_eps, axis="heads", dtype=dtype)
        self.out_proj = Projection(inner, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> LogLinearLayerState:
        """`max_length` tokens must be within the layer's own."""
        self._check_length(max_length)
        shape = (batch_size, self.heads, self.levels, self.state_dim, self.head_dim)
        return LogLinearLayerState(
            memory=LogLinearState(jnp.zeros(shape, jnp.float32), jnp.zeros((batch_size,), jnp.int32)),
            x_tail=self.x_conv.init_state(batch_size),
            bc_tail=self.bc_conv.init_state(batch_size),
            document=no_document(batch_size),
        )

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            checks.fail("max_length", self.max_length, f"at least the {length} tokens of a document")

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: one write, and a read of every level."""
        levels = max(length, 1).bit_length() + 1
        return 2 * (1 + levels) * self.heads * self.state_dim * self.head_dim

    def __call__(
        self,
        x: Hidden,
        state: LogLinearLayerState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, LogLinearLayerState | None]:
        """`positions` is of no consequence here: levels count the tokens of a document."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        self._check_length(x.shape[1])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        memory, x_tail, bc_tail = (None, None, None) if state is None else state[:3]

        z, inner = self.z_proj(x), self.x_proj(x)
        inner, x_tail = self.x_conv(inner, x_tail, segment_ids=segment_ids)
        bc, bc_tail = self.bc_conv(self.bc_proj(x), bc_tail, segment_ids=segment_ids)
        B, C = jnp.split(bc.reshape(*x.shape[:2], 2 * self.groups, self.state_dim), 2, axis=2)
        inner = inner.reshape(*x.shape[:2], self.heads, self.head_dim)
        dt = self.dt_proj(x).astype(jnp.float32)
        step = jax.nn.softplus(dt + self.decay.dt_bias[...])  # [B, T, H]
        dl = self.dl_proj(x).astype(jnp.float32).reshape(*x.shape[:2], self.heads, self.levels)

        y, memory = log_linear_attention(
            C,
            B,
            (inner * step[..., None]).astype(self.dtype),
            self.decay(dt),
            jax.nn.softplus(self.L[...] * dl),
            scale=1.0,
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = (y + self.D[...][:, None] * inner).reshape(z.shape)
        y = self.out_proj(self.norm(y * jax.nn.silu(z.astype(jnp.float32))))
        if state is None or x_tail is None or bc_tail is None:
            return y, None
        return y, LogLinearLayerState(memory, x_tail, bc_tail, new_document(state.document, segment_ids))
