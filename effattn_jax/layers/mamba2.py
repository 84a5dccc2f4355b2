"""Mamba-2: state-space duality on the scalar-decay memory (Dao & Gu 2024, arXiv:2405.21060)."""

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
from effattn_jax.linear import scalar_decay
from effattn_jax.typing import Array, Float, Hidden, Int, MatrixState, Positions, SegmentIds


class Mamba2State(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: MatrixState  # [B, H, N, P]
    x_tail: Float[Array, "B W-1 HP"]
    bc_tail: Float[Array, "B W-1 2GN"]
    document: Int[Array, " B"]


class Mamba2(nnx.Module):
    """z, x, B, C, dt = projections of the input; x, (B, C) pass a short convolution and silu; for every head h

        dt = softplus(dt + dt_bias),  A = -e^{A_log}
        S_t = e^{A dt_t} S_{t-1} + B_t (dt_t x_t)^T,   y_t = S_t^T C_t + D x_t
        output = W_out RMSNorm(y * silu(z))

    which is `scalar_decay` with q = C, k = B, v = dt x, log_decay = A dt and scale 1. B and C are shared by the H / G
    consecutive heads of a group; the norm runs over each group's channels.
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
        norm_eps: float = 1e-5,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        inner = expand * dim
        if inner % head_dim:
            checks.fail("head_dim", head_dim, f"a divisor of expand * dim = {inner}")
        heads = inner // head_dim
        checks.check_head_groups("groups", groups, "the mixer", heads)
        self.heads, self.head_dim, self.state_dim, self.groups = heads, head_dim, state_dim, groups
        self.dtype, self.implementation = dtype, implementation

        self.z_proj = Projection(dim, inner, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.x_proj = Projection(dim, inner, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.bc_proj = Projection(dim, 2 * groups * state_dim, ("embed", "state"), dtype=dtype, rngs=rngs)
        self.dt_proj = Projection(dim, heads, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.x_conv = ShortConvolution(inner, conv_width, axis="heads", dtype=dtype, rngs=rngs)
        self.bc_conv = ShortConvolution(2 * groups * state_dim, conv_width, axis="state", dtype=dtype, rngs=rngs)
        self.A_log = nnx.Param(
            jnp.log(jax.random.uniform(rngs.params(), (heads,), jnp.float32, 1, 16)), axes=("heads",)
        )
        self.dt_bias = nnx.Param(dt_bias(rngs.params(), (heads,)), axes=("heads",))
        self.D = nnx.Param(jnp.ones((heads,), jnp.float32), axes=("heads",))
        self.norm = RMSNorm(inner, groups=groups, eps=norm_eps, axis="heads", dtype=dtype)
        self.out_proj = Projection(inner, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> Mamba2State:
        """`max_length` is of no consequence here: the state has one size."""
        return Mamba2State(
            memory=jnp.zeros((batch_size, self.heads, self.state_dim, self.head_dim), jnp.float32),
            x_tail=self.x_conv.init_state(batch_size),
            bc_tail=self.bc_conv.init_state(batch_size),
            document=no_document(batch_size),
        )

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: the recurrence, one write and one read."""
        return 4 * self.heads * self.state_dim * self.head_dim

    def __call__(
        self,
        x: Hidden,
        state: Mamba2State | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, Mamba2State | None]:
        """`positions` is of no consequence here: the recurrence knows the order."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        memory, x_tail, bc_tail = (None, None, None) if state is None else state[:3]

        z, inner = self.z_proj(x), self.x_proj(x)
        inner, x_tail = self.x_conv(inner, x_tail, segment_ids=segment_ids)
        bc, bc_tail = self.bc_conv(self.bc_proj(x), bc_tail, segment_ids=segment_ids)
        B, C = jnp.split(bc.reshape(*x.shape[:2], 2 * self.groups, self.state_dim), 2, axis=2)
        inner = inner.reshape(*x.shape[:2], self.heads, self.head_dim)
        dt = jax.nn.softplus(self.dt_proj(x).astype(jnp.float32) + self.dt_bias[...])  # [B, T, H]

        y, memory = scalar_decay(
            C,
            B,
            (inner * dt[..., None]).astype(self.dtype),
            -jnp.exp(self.A_log[...]) * dt,
            scale=1.0,
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = (y + self.D[...][:, None] * inner).reshape(z.shape)
        y = self.out_proj(self.norm(y * jax.nn.silu(z.astype(jnp.float32))))
        if state is None or x_tail is None or bc_tail is None:
            return y, None
        return y, Mamba2State(memory, x_tail, bc_tail, new_document(state.document, segment_ids))
