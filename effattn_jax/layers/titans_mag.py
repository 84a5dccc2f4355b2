"""Titans, memory as a gate (MAG; Behrouz et al. 2025, arXiv:2501.00663)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.neural_memory import MemoryState, NeuralMemory
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.layers.titans import width_of_head
from effattn_jax.layers.window_attention import WindowAttention, WindowState
from effattn_jax.typing import Hidden, Positions, SegmentIds


class MAGState(NamedTuple):
    memory: MemoryState
    window: WindowState


class TitansMAG(nnx.Module):
    """y = attention to the window and to persistent tokens (`WindowAttention`), m = M_t(q_t) (`NeuralMemory`),

        output = W_out (RMSNorm(y) * sigmoid(RMSNorm(m)) * silu(W_gate x))

    Both branches read the input. The paper's memory also reads the persistent tokens first; that changes it alike for
    every input, and its learned start stands for it. The non-linearity between the two normed branches is left open in
    the paper; here it is the sigmoid of a gate.

    Args:
      window: W, tokens that attention sees, the token's own included.
      persistent: N_p learned tokens that attention always sees.
      rope_theta: base of the rotary positions in the window; None is none.
      heads, head_dim, depth, expand, activation, chunk, max_step, conv_width: see `Titans`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        head_dim: int | None = None,
        window: int = 256,
        persistent: int = 4,
        rope_theta: float | None = 10_000.0,
        depth: int = 2,
        expand: int = 4,
        activation: str = "gelu",
        chunk: int = 16,
        max_step: float = 1.0,
        conv_width: int = 4,
        norm_eps: float = 1e-5,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        head_dim = width_of_head(dim, heads, head_dim)
        inner = heads * head_dim
        self.attention = WindowAttention(
            dim,
            heads=heads,
            head_dim=head_dim,
            window=window,
            persistent=persistent,
            rope_theta=rope_theta,
            dtype=dtype,
            implementation=implementation,
            rngs=rngs,
        )
        self.memory = NeuralMemory(
            dim,
            heads=heads,
            head_dim=head_dim,
            depth=depth,
            expand=expand,
            activation=activation,
            chunk=chunk,
            max_step=max_step,
            conv_width=conv_width,
            dtype=dtype,
            implementation=implementation,
            rngs=rngs,
        )
        self.attention_norm = RMSNorm(inner, eps=norm_eps, axis="heads", dtype=dtype)
        self.memory_norm = RMSNorm(inner, eps=norm_eps, axis="heads", dtype=dtype)
        self.gate_proj = Projection(dim, inner, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.out_proj = Projection(inner, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> MAGState:
        """`max_length` is of no consequence here: the state has one size."""
        return MAGState(self.memory.init_state(batch_size), self.attention.init_state(batch_size))

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections."""
        return self.memory.mixing_flops() + self.attention.mixing_flops(length)

    def __call__(
        self,
        x: Hidden,
        state: MAGState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, MAGState | None]:
        """`positions` [B, T] turn queries and keys; None counts on from the tokens before."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        memory, window = (None, None) if state is None else state
        y, window = self.attention(x, window, segment_ids=segment_ids, positions=positions)
        m, memory = self.memory(x, memory, segment_ids=segment_ids)
        gate = jax.nn.sigmoid(self.memory_norm(m.reshape(y.shape)))
        out = self.out_proj(self.attention_norm(y) * gate * jax.nn.silu(self.gate_proj(x)))
        return out, None if memory is None or window is None else MAGState(memory, window)
