"""Queries and keys: two projections, or one whose output passes two convolutions."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn_jax.layers.projection import Projection
from effattn_jax.layers.short_convolution import ShortConvolution
from effattn_jax.typing import Array, Float, Hidden, SegmentIds

Tail = Float[Array, "B W-1 C"]


class QueryKey(nnx.Module):
    """q = W_q x, k = W_k x."""

    def __init__(self, dim: int, out_dim: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.q_proj = Projection(dim, out_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k_proj = Projection(dim, out_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int) -> None:
        """Nothing is remembered."""

    def __call__(
        self, x: Hidden, tail: None = None, *, segment_ids: SegmentIds | None = None
    ) -> tuple[Array, Array, None]:
        return self.q_proj(x), self.k_proj(x), None


class SharedQueryKey(nnx.Module):
    """q = conv_q(W x), k = conv_k(W x), without activations. The state is the tail of W x, which both read."""

    def __init__(self, dim: int, out_dim: int, *, conv_width: int, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.proj = Projection(dim, out_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.q_conv = ShortConvolution(out_dim, conv_width, activation=identity, dtype=dtype, rngs=rngs)
        self.k_conv = ShortConvolution(out_dim, conv_width, activation=identity, dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int) -> Tail:
        return self.q_conv.init_state(batch_size)

    def __call__(
        self, x: Hidden, tail: Tail | None = None, *, segment_ids: SegmentIds | None = None
    ) -> tuple[Array, Array, Tail | None]:
        x = self.proj(x)
        k, _ = self.k_conv(x, tail, segment_ids=segment_ids)
        q, tail = self.q_conv(x, tail, segment_ids=segment_ids)
        return q, k, tail


def identity(x: Array) -> Array:
    return x
