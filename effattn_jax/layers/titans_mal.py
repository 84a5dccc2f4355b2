"""Titans, memory as a layer (MAL; Behrouz et al. 2025, arXiv:2501.00663)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from effattn_jax.dispatch import Implementation
from effattn_jax.layers.neural_memory import MemoryState
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.titans import Titans, width_of_head
from effattn_jax.layers.window_attention import WindowAttention, WindowState
from effattn_jax.typing import Hidden, Positions, SegmentIds


class MALState(NamedTuple):
    memory: MemoryState
    window: WindowState


class TitansMAL(nnx.Module):
    """The memory, then attention to the window and to persistent tokens: output = W_out Attention(Titans(x)).

    The memory's answers to persistent tokens before the sequence are the same for every input: attention has learned
    ones in their place. Options as in `TitansMAG`.
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
        self.memory = Titans(
            dim,
            heads=heads,
            head_dim=head_dim,
            depth=depth,
            expand=expand,
            activation=activation,
            chunk=chunk,
            max_step=max_step,
            conv_width=conv_width,
            norm_eps=norm_eps,
            dtype=dtype,
            implementation=implementation,
            rngs=rngs,
        )
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
        self.out_proj = Projection(heads * head_dim, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> MALState:
        """`max_length` is of no consequence here: the state has one size."""
        return MALState(self.memory.init_state(batch_size, max_length), self.attention.init_state(batch_size))

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections."""
        return self.memory.mixing_flops(length) + self.attention.mixing_flops(length)

    def __call__(
        self,
        x: Hidden,
        state: MALState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, MALState | None]:
        """`positions` [B, T] turn queries and keys; None counts on from the tokens before."""
        memory, window = (None, None) if state is None else state
        y, memory = self.memory(x, memory, segment_ids=segment_ids)
        y, window = self.attention(y, window, segment_ids=segment_ids, positions=positions)
        return self.out_proj(y), None if memory is None or window is None else MALState(memory, window)
