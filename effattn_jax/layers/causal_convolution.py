"""A short causal convolution as a mixer of its own: what TTT's Mamba backbone has before each TTT layer."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.query_key import identity
from effattn_jax.layers.short_convolution import ShortConvolution
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds


class CausalConvolutionState(NamedTuple):
    tail: Float[Array, "B W-1 D"]
    document: Int[Array, " B"]


class CausalConvolution(nnx.Module):
    """y_t = b + sum_i w_i * x_{t - W + 1 + i}, a filter per channel.

    Args:
      dim: D.
      width: W taps.
    """

    def __init__(self, dim: int, *, width: int = 4, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.conv = ShortConvolution(dim, width, activation=identity, axis="embed", dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> CausalConvolutionState:
        """`max_length` is of no consequence here: the state has one size."""
        return CausalConvolutionState(self.conv.init_state(batch_size), no_document(batch_size))

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs."""
        return 2 * self.conv.width * self.conv.dim

    def __call__(
        self,
        x: Hidden,
        state: CausalConvolutionState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, CausalConvolutionState | None]:
        """`positions` is of no consequence here: the order is all that counts."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        y, tail = self.conv(x, None if state is None else state.tail, segment_ids=segment_ids)
        if state is None or tail is None:
            return y, None
        return y, CausalConvolutionState(tail, new_document(state.document, segment_ids))
