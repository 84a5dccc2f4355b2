"""Feed-forward layers of RWKV-4 to RWKV-6, which look one token back (Peng et al. 2024, arXiv:2404.05892)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers import rwkv_start
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rwkv7_channel_mix import ChannelMixState
from effattn_jax.layers.token_shift import init_shift, token_shift
from effattn_jax.typing import Array, Float, Hidden, Positions, SegmentIds


class RWKV6ChannelMix(nnx.Module):
    """y_t = sigmoid(W_r x_r) * W_v relu(W_k x_k)^2 with x_c = x_t + (x_{t-1} - x_t) * mu_c for each of c = r, k.

    The authors' hidden size is 3.5 D. Weights start by the place of the layer in the stack, `layer_index` of
    `layer_count`.
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
        self.dtype = dtype
        project = lambda in_dim, out_dim, axes, start: Projection(  # noqa: E731
            in_dim, out_dim, axes, initializer=start, dtype=dtype, rngs=rngs
        )
        # its own inverse: mu for a share of the token before
        share = self.share_of_before(1 - rwkv_start.own_share(dim, 1, layer_index, layer_count))
        self.mu_k, self.mu_r = nnx.Param(share, axes=("embed",)), nnx.Param(share, axes=("embed",))
        self.k_proj = project(dim, hidden_dim, ("embed", "mlp"), rwkv_start.ORTHOGONAL)
        self.v_proj = project(hidden_dim, dim, ("mlp", "embed"), rwkv_start.SILENT)
        self.r_proj = project(dim, dim, ("embed", "mlp"), rwkv_start.SILENT)

    @staticmethod
    def share_of_before(mu: Float[Array, " D"]) -> Float[Array, " D"]:
        return mu

    def init_state(self, batch_size: int, max_length: int) -> ChannelMixState:
        """`max_length` is of no consequence here: the state has one size."""
        return ChannelMixState(init_shift(batch_size, self.mu_k.shape[0], self.dtype), no_document(batch_size))

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
        mixed = lambda mu: x + (before - x) * self.share_of_before(mu[...]).astype(self.dtype)  # noqa: E731
        y = self.v_proj(jnp.square(jax.nn.relu(self.k_proj(mixed(self.mu_k)))))
        y = jax.nn.sigmoid(self.r_proj(mixed(self.mu_r))) * y
        if state is None or shift is None:
            return y, None
        return y, ChannelMixState(shift, new_document(state.document, segment_ids))


class RWKV5ChannelMix(RWKV6ChannelMix):
    """The same with x_c = mu_c * x_t + (1 - mu_c) * x_{t-1}; that of RWKV-4 too, whose hidden size is 4 D."""

    @staticmethod
    def share_of_before(mu: Float[Array, " D"]) -> Float[Array, " D"]:
        return 1 - mu
