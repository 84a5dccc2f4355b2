"""Queries, keys and values that have each passed a short convolution: what the delta rules and their kin start from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax.layers.projection import Projection
from effattn_jax.layers.short_convolution import ShortConvolution
from effattn_jax.typing import Array, Float, Hidden, SegmentIds


class QKVTails(NamedTuple):
    """The last W - 1 inputs of each convolution."""

    q: Float[Array, "B W-1 GK"]
    k: Float[Array, "B W-1 GK"]
    v: Float[Array, "B W-1 HV"]


class ShortQKV(nnx.Module):
    """q, k, v = f(conv(W x)), each with a projection and a filter of its own, in heads.

    Args:
      q, k, v: (heads, dimension of a head) of each.
      activation: f of queries and keys; that of the values is silu.
    """

    def __init__(
        self,
        dim: int,
        *,
        q: tuple[int, int],
        k: tuple[int, int],
        v: tuple[int, int],
        conv_width: int = 4,
        activation: Callable[[Array], Array] = jax.nn.silu,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.q_shape, self.k_shape, self.v_shape = q, k, v
        project = lambda shape: Projection(dim, shape[0] * shape[1], ("embed", "heads"), dtype=dtype, rngs=rngs)  # noqa: E731
        convolve = lambda shape, f: ShortConvolution(  # noqa: E731
            shape[0] * shape[1], conv_width, activation=f, bias=False, dtype=dtype, rngs=rngs
        )
        self.q_proj, self.k_proj, self.v_proj = project(q), project(k), project(v)
        self.q_conv, self.k_conv, self.v_conv = convolve(q, activation), convolve(k, activation), convolve(v, nnx.silu)

    def init_state(self, batch_size: int) -> QKVTails:
        convolutions = (self.q_conv, self.k_conv, self.v_conv)
        return QKVTails(*(convolution.init_state(batch_size) for convolution in convolutions))

    def __call__(
        self, x: Hidden, tails: QKVTails | None = None, *, segment_ids: SegmentIds | None = None
    ) -> tuple[Float[Array, "B T G K"], Float[Array, "B T G K"], Float[Array, "B T H V"], QKVTails | None]:
        """Tails, if given, belong to the first document of each row."""
        q_tail, k_tail, v_tail = (None, None, None) if tails is None else tails
        q, q_tail = self.q_conv(self.q_proj(x), q_tail, segment_ids=segment_ids)
        k, k_tail = self.k_conv(self.k_proj(x), k_tail, segment_ids=segment_ids)
        v, v_tail = self.v_conv(self.v_proj(x), v_tail, segment_ids=segment_ids)
        q, k, v = (
            y.reshape(*x.shape[:2], *shape) for y, shape in ((q, self.q_shape), (k, self.k_shape), (v, self.v_shape))
        )
        if q_tail is None or k_tail is None or v_tail is None:
            return q, k, v, None
        return q, k, v, QKVTails(q_tail, k_tail, v_tail)
