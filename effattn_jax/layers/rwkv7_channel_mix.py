"""Feed-forward layer of RWKV-7, which looks one token back (Peng et al. 2025, arXiv:2503.14456)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rwkv7_start import start_channel_mix
from effattn_jax.layers.token_shift import init_shift, token_shift
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds


class ChannelMixState(NamedTuple):
    """The last token."""

    shift: Float[Array, "B 1 D"]
    document: Int[Array, " B"]


class RWKV7ChannelMix(nnx.Module):
    """y_t = W_v relu(W_k (x_t + (x_{t-1} - x_t) * mu_k))^2; the authors' hidden size is 4 D.

    Weights start by the place of the layer in the stack, `layer_index` of `layer_count`.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        layer_index: int | Array = 0,
        layer_count: int = 1,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dim, self.dtype = dim, dtype
        self.mu_k = nnx.Param(jnp.zeros((dim,), jnp.float32), axes=("embed",))
        self.k_proj = Projection(dim, hidden_dim, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.v_proj = Projection(hidden_dim, dim, ("mlp", "embed"), dtype=dtype, rngs=rngs)
        start_channel_mix(self, layer_index, layer_count, rngs)

    def init_state(self, batch_size: int, max_length: int) -> ChannelMixState:
        """`max_length` is of no consequence here: the state has one size."""
        return ChannelMixState(init_shift(batch_size, self.dim, self.dtype), no_document(batch_size))

    def mixing_flops(self, length: int) -> float:
        """None beside the projections."""
        return 0

    def __call__(
        self,
        x: Hidden,
        state: ChannelMixState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, ChannelMixState | None]:
        """`positions` is of no consequence here: the shift knows the order."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        x = x.astype(self.dtype)
        before, shift = token_shift(x, None if state is None else state.shift, segment_ids)
        mixed = x + (before - x) * self.mu_k[...].astype(self.dtype)
        y = self.v_proj(jnp.square(jax.nn.relu(self.k_proj(mixed))))
        if state is None or shift is None:
            return y, None
        return y, ChannelMixState(shift, new_document(state.document, segment_ids))
