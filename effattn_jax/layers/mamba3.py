"""Mamba-3, one input per head: trapezoidal steps and turning states, no convolution (arXiv:2603.15569)."""

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
from effattn_jax.linear import Mamba3Memory, mamba3
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds

LEAST_RATE = 1e-4


class Mamba3State(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: Mamba3Memory
    document: Int[Array, " B"]


class Mamba3(nnx.Module):
    """z, x, B, C and numbers per head s, a, t and angles w are projections of the input; for every head

        dt = softplus(s + dt_bias),  A = -max(rate(a), 1e-4),  lambda = sigmoid(t),  angle = tanh(w) pi dt
        k = RMSNorm(B) + bias,  q = RMSNorm(C) + bias, both turned by the sum of the angles
        S_t = e^{A_t dt_t} (S_{t-1} + (1 - lambda_t) dt_t k_{t-1} x_{t-1}^T) + lambda_t dt_t k_t x_t^T
        output = W_out ((S_t^T q_t + D x_t) * silu(z))

    with rate(a) = 1 + a for a >= 0, else 1 / (1 - a). Norms and angles are shared by the heads of a group, biases are
    per head.

    Args:
      dim: D.
      expand: inner channels over D.
      head_dim: P, channels of a head.
      state_dim: N, rows of the memory.
      groups: of heads that share B and C.
      rope_fraction: part of the rows that turn, in pairs of neighbours.
      norm_eps: eps of the norms.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        head_dim: int = 64,
        state_dim: int = 128,
        groups: int = 1,
        rope_fraction: float = 0.5,
        norm_eps: float = 1e-5,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        inner = expand * dim
        if head_dim < 1 or inner % head_dim:
            checks.fail("head_dim", head_dim, f"a divisor of expand * dim = {inner}")
        heads, pairs = inner // head_dim, int(state_dim * rope_fraction) // 2
        checks.check_head_groups("groups", groups, "the mixer", heads)
        if not 1 <= pairs <= state_dim // 2:
            checks.fail("rope_fraction", f"{rope_fraction} of state_dim {state_dim}", "between 1 and N / 2 pairs")
        self.heads, self.head_dim, self.state_dim, self.groups, self.pairs = heads, head_dim, state_dim, groups, pairs
        self.dtype, self.implementation = dtype, implementation

        project = lambda size, axis: Projection(dim, size, ("embed", axis), dtype=dtype, rngs=rngs)  # noqa: E731
        self.z_proj, self.x_proj = project(inner, "heads"), project(inner, "heads")
        self.B_proj, self.C_proj = project(groups * state_dim, "state"), project(groups * state_dim, "state")
        self.dt_proj, self.A_proj, self.mix_proj = (project(heads, "heads") for _ in range(3))
        self.angle_proj = project(pairs, "state")
        self.dt_bias = nnx.Param(dt_bias(rngs.params(), (heads,)), axes=("heads",))
        self.B_norm = RMSNorm(state_dim, eps=norm_eps, axis="state", dtype=dtype)
        self.C_norm = RMSNorm(state_dim, eps=norm_eps, axis="state", dtype=dtype)
        self.B_bias = nnx.Param(jnp.ones((heads, state_dim), jnp.float32), axes=("heads", "state"))
        self.C_bias = nnx.Param(jnp.ones((heads, state_dim), jnp.float32), axes=("heads", "state"))
        self.D = nnx.Param(jnp.ones((heads,), jnp.float32), axes=("heads",))
        self.out_proj = Projection(inner, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> Mamba3State:
        """`max_length` is of no consequence here: the state has one size."""
        zeros = lambda *shape: jnp.zeros((batch_size, self.heads, *shape), jnp.float32)  # noqa: E731
        matrix = zeros(self.state_dim, self.head_dim)
        memory = Mamba3Memory(matrix, zeros(self.pairs), zeros(self.state_dim), zeros(self.head_dim))
        return Mamba3State(memory, no_document(batch_size))

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: the recurrence, one write and one read."""
        return 4 * self.heads * self.state_dim * self.head_dim

    def __call__(
        self,
        x: Hidden,
        state: Mamba3State | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, Mamba3State | None]:
        """`positions` is of no consequence here: the recurrence knows the order."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)

        z, inner = self.z_proj(x), self.x_proj(x).reshape(*x.shape[:2], self.heads, self.head_dim)
        k = self._rows(self.B_norm, self.B_proj(x), self.B_bias[...])
        q = self._rows(self.C_norm, self.C_proj(x), self.C_bias[...])
        float32 = lambda proj: proj(x).astype(jnp.float32)  # noqa: E731
        dt = jax.nn.softplus(float32(self.dt_proj) + self.dt_bias[...])  # [B, T, H]
        A = -jnp.maximum(rate(float32(self.A_proj)), LEAST_RATE)
        angle = jnp.tanh(float32(self.angle_proj))[:, :, None, :] * jnp.pi * dt[..., None]
        y, memory = mamba3(
            q,
            k,
            inner,
            A * dt,
            dt,
            jax.nn.sigmoid(float32(self.mix_proj)),
            angle,
            initial_state=None if state is None else state.memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = (y + self.D[...].astype(self.dtype)[:, None] * inner).reshape(z.shape)
        y = self.out_proj(y * jax.nn.silu(z))
        if state is None:
            return y, None
        return y, Mamba3State(memory, new_document(state.document, segment_ids))

    def _rows(self, norm: RMSNorm, x: Array, bias: Array) -> Float[Array, "B T H N"]:
        """Normalised, repeated for the heads of a group, with the bias of each."""
        x = norm(x.reshape(*x.shape[:2], self.groups, self.state_dim))
        return (jnp.repeat(x, self.heads // self.groups, axis=2) + bias).astype(self.dtype)


def rate(x: Array) -> Array:
    """1 + x for x >= 0, else 1 / (1 - x): positive, with a slope that never vanishes."""
    return jnp.where(x >= 0, 1 + x, 1 / (1 + jnp.maximum(-x, 0)))
