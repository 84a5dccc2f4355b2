"""Titans, memory alone (LMM; Behrouz et al. 2025, arXiv:2501.00663)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.neural_memory import MemoryState, NeuralMemory
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.typing import Hidden, Positions, SegmentIds


class Titans(nnx.Module):
    """output = W_out (RMSNorm(M_t(q_t)) * silu(W_gate x_t)), the norm over each head.

    M is a network that learns the sequence by gradient descent with momentum and forgetting: see `NeuralMemory`, which
    also says what the paper leaves open. Persistent tokens before the sequence would change such a memory alike for
    every input: its learned start M_0 stands for them.

    Args:
      heads: H memories, each with queries, keys and values of its own.
      head_dim: their width; None is dim / heads.
      depth: matrices of a memory, 1 (linear) to 4 in the paper.
      expand: hidden width of a memory over head_dim.
      activation: between its matrices, "gelu" or "silu".
      chunk: tokens whose gradients are taken at the same weights.
      max_step: largest theta, times the width of a head.
      conv_width: taps of the convolutions after the projections.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        head_dim: int | None = None,
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
        self.norm = RMSNorm(inner, groups=heads, eps=norm_eps, axis="heads", dtype=dtype)
        self.gate_proj = Projection(dim, inner, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.out_proj = Projection(inner, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> MemoryState:
        """`max_length` is of no consequence here: the state has one size."""
        return self.memory.init_state(batch_size)

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections."""
        return self.memory.mixing_flops()

    def __call__(
        self,
        x: Hidden,
        state: MemoryState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, MemoryState | None]:
        """`positions` is of no consequence here: the memory knows the order."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        y, state = self.memory(x, state, segment_ids=segment_ids)
        gate = jax.nn.silu(self.gate_proj(x))
        return self.out_proj(self.norm(y.reshape(gate.shape)) * gate), state


def width_of_head(dim: int, heads: int, head_dim: int | None) -> int:
    if heads < 1 or (head_dim is None and dim % heads):
        checks.fail("heads", heads, f"a divisor of dim = {dim}, or head_dim")
    return dim // heads if head_dim is None else head_dim
