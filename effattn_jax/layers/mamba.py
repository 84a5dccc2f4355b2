"""Mamba: the selective scan between a convolution and a gate (Gu & Dao 2023, arXiv:2312.00752)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.initializers import dt_bias
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.layers.short_convolution import ShortConvolution
from effattn_jax.linear import selective_scan
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds

NORMS = ("none", "weightless", "learned")


class MambaState(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: Float[Array, "B E N"]
    tail: Float[Array, "B W-1 E"]
    document: Int[Array, " B"]


class Mamba(nnx.Module):
    """x, z = projections of the input to E channels; x passes a short convolution and silu; from it

        dt = softplus(W_up norm(W_dt x) + dt_bias),  B = norm(W_B x),  C = norm(W_C x),  A = -e^{A_log}
        h_t = e^{dt_t A} * h_{t-1} + (dt_t x_t) B_t^T,   y_t = h_t C_t + D * x_t
        output = W_out (y * silu(z))

    Args:
      dim: D.
      expand, inner_dim: E / D, or E.
      state_dim: N, memories per channel.
      dt_rank: channels between W_dt and W_up; None means ceil(D / 16).
      conv_width: taps of the convolution.
      norm: of the narrow channels, the B and the C: "none" (Mamba), "weightless" RMS norms (Falcon Mamba, Zuo et al.
        2024, arXiv:2410.05355) or "learned" ones (Jamba, Lieber et al. 2024, arXiv:2403.19887).
      norm_eps: their eps.
      layer_count: L of the model; W_out starts smaller by sqrt(L).
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        inner_dim: int | None = None,
        state_dim: int = 16,
        dt_rank: int | None = None,
        conv_width: int = 4,
        norm: str = "none",
        norm_eps: float = 1e-6,
        layer_count: int = 1,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        if norm not in NORMS:
            checks.fail("norm", repr(norm), f"one of {', '.join(NORMS)}")
        inner = expand * dim if inner_dim is None else inner_dim
        dt_rank = -(-dim // 16) if dt_rank is None else dt_rank
        for name, size in (("state_dim", state_dim), ("dt_rank", dt_rank)):
            if size < 1:
                checks.fail(name, size, "at least 1")
        self.inner, self.state_dim, self.norm = inner, state_dim, norm
        self.dtype, self.implementation = dtype, implementation

        self.z_proj = Projection(dim, inner, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.x_proj = Projection(dim, inner, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.conv = ShortConvolution(inner, conv_width, axis="heads", dtype=dtype, rngs=rngs)
        self.dt_down = Projection(inner, dt_rank, ("heads", "state"), dtype=dtype, rngs=rngs)
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within dt_rank^-1/2
        self.dt_up = Projection(dt_rank, inner, ("state", "heads"), initializer=uniform, dtype=dtype, rngs=rngs)
        self.dt_bias = nnx.Param(dt_bias(rngs.params(), (inner,)), axes=("heads",))
        self.B_proj = Projection(inner, state_dim, ("heads", "state"), dtype=dtype, rngs=rngs)
        self.C_proj = Projection(inner, state_dim, ("heads", "state"), dtype=dtype, rngs=rngs)
        if norm != "none":
            normed = lambda size: RMSNorm(size, affine=norm == "learned", eps=norm_eps, axis="state", dtype=dtype)  # noqa: E731
            self.dt_norm, self.B_norm, self.C_norm = normed(dt_rank), normed(state_dim), normed(state_dim)
        rates = jnp.broadcast_to(jnp.arange(1, state_dim + 1, dtype=jnp.float32), (inner, state_dim))
        self.A_log = nnx.Param(jnp.log(rates), axes=("heads", "state"))
        self.D = nnx.Param(jnp.ones((inner,), jnp.float32), axes=("heads",))
        smaller = nnx.initializers.variance_scaling(1 / layer_count, "fan_in", "truncated_normal")
        self.out_proj = Projection(inner, dim, ("heads", "embed"), initializer=smaller, dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> MambaState:
        """`max_length` is of no consequence here: the state has one size."""
        return MambaState(
            memory=jnp.zeros((batch_size, self.inner, self.state_dim), jnp.float32),
            tail=self.conv.init_state(batch_size),
            document=no_document(batch_size),
        )

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: decay, write and read of every memory."""
        return 6 * self.inner * self.state_dim

    def __call__(
        self,
        x: Hidden,
        state: MambaState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, MambaState | None]:
        """`positions` is of no consequence here: the recurrence knows the order."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        memory, tail = (None, None) if state is None else state[:2]

        z = self.z_proj(x)
        x, tail = self.conv(self.x_proj(x), tail, segment_ids=segment_ids)
        narrow, B, C = self.dt_down(x), self.B_proj(x), self.C_proj(x)
        if self.norm != "none":
            narrow, B, C = self.dt_norm(narrow), self.B_norm(B), self.C_norm(C)
        dt = jax.nn.softplus(self.dt_up(narrow).astype(jnp.float32) + self.dt_bias[...])
        y, memory = selective_scan(
            x,
            dt,
            -jnp.exp(self.A_log[...]),
            B,
            C,
            self.D[...],
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = self.out_proj(y * jax.nn.silu(z))
        if state is None or tail is None:
            return y, None
        return y, MambaState(memory, tail, new_document(state.document, segment_ids))
