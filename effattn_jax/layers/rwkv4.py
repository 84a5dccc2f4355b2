"""RWKV-4: an average of the past under exponential weights (Peng et al. 2023, arXiv:2305.13048)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers import rwkv_start
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rwkv_time_mix import LARGEST_W
from effattn_jax.layers.token_shift import init_shift, token_shift
from effattn_jax.linear import RWKV4Memory, rwkv4
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds


class RWKV4State(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: RWKV4Memory  # each [B, E]
    shift: Float[Array, "B 1 D"]
    document: Int[Array, " B"]


class RWKV4(nnx.Module):
    """The time mix. With x_c = mu_c * x_t + (1 - mu_c) * x_{t-1} for each of c = r, k, v:

        r = W_r x_r,   k = W_k x_k,   v = W_v x_v, each of E channels
        o_t = (sum_{j < t} e^{-(t - 1 - j) e^w + k_j} v_j + e^{u + k_t} v_t) / (the same of ones)
        output = W_o (sigmoid(r) * o)

    which is `effattn_jax.linear.rwkv4`; w and u are learned, a number per channel. The channel mix that goes with it is
    `RWKV5ChannelMix`. Weights start as the authors' do, by the place of the layer in the stack.

    Args:
      width: E; None means dim.
      layer_index, layer_count: the place in the stack.
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int | None = None,
        layer_index: int | Array = 0,
        layer_count: int = 1,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        width = dim if width is None else width
        if width < 1:
            checks.fail("width", width, "at least 1")
        self.width, self.dtype, self.implementation = width, dtype, implementation
        place = (layer_index, layer_count)
        share = lambda power: rwkv_start.own_share(dim, power, *place)  # noqa: E731
        project = lambda start: Projection(  # noqa: E731
            dim, width, ("embed", "heads"), initializer=start, dtype=dtype, rngs=rngs
        )
        self.mu_r = nnx.Param(share(0.5), axes=("embed",))
        self.mu_k = nnx.Param(share(1), axes=("embed",))
        self.mu_v = nnx.Param(share(1) + 0.3 * rwkv_start.height(*place), axes=("embed",))
        self.r_proj, self.k_proj = project(rwkv_start.SILENT), project(rwkv_start.SILENT)
        self.v_proj = project(rwkv_start.ORTHOGONAL)
        self.w = nnx.Param(rwkv_start.decay4(width, *place), axes=("heads",))
        self.u = nnx.Param(rwkv_start.bonus4(width), axes=("heads",))
        self.out_proj = Projection(
            width, dim, ("heads", "embed"), initializer=rwkv_start.SILENT, dtype=dtype, rngs=rngs
        )

    def init_state(self, batch_size: int, max_length: int) -> RWKV4State:
        """`max_length` is of no consequence here: the state has one size."""
        zeros = jnp.zeros((batch_size, self.width), jnp.float32)
        return RWKV4State(
            memory=RWKV4Memory(zeros, zeros, zeros),
            shift=init_shift(batch_size, self.mu_k.shape[0], self.dtype),
            document=no_document(batch_size),
        )

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: decay, write and read of both sums."""
        return 12 * self.width

    def __call__(
        self,
        x: Hidden,
        state: RWKV4State | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, RWKV4State | None]:
        """`positions` is of no consequence here: the recurrence knows the order."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        x = x.astype(self.dtype)
        before, shift = token_shift(x, None if state is None else state.shift, segment_ids)
        mixed = lambda mu: before + (x - before) * mu[...].astype(self.dtype)  # noqa: E731
        o, memory = rwkv4(
            self.k_proj(mixed(self.mu_k)),
            self.v_proj(mixed(self.mu_v)),
            -jnp.exp(jnp.minimum(self.w[...], LARGEST_W)),
            self.u[...],
            initial_state=None if state is None else state.memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = self.out_proj(jax.nn.sigmoid(self.r_proj(mixed(self.mu_r))) * o)
        if state is None or shift is None:
            return y, None
        return y, RWKV4State(memory, shift, new_document(state.document, segment_ids))
