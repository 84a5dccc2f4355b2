"""The recurrent block of Griffin: a gate beside a convolution and an RG-LRU (De et al. 2024, arXiv:2402.19427)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import NONE, continues, forget_other_documents, new_document, no_document
from effattn_jax.layers.initializers import inverse_softplus
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.short_convolution import ShortConvolution
from effattn_jax.linear import rg_lru
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds


class RGLRUState(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: Float[Array, "B E"]
    tail: Float[Array, "B W-1 E"]
    document: Int[Array, " B"]


class BlockDiagonal(nnx.Module):
    """y = x W + b in float32, with W of `blocks` square blocks on the diagonal, multiplied in `dtype`."""

    def __init__(self, dim: int, blocks: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        width = dim // blocks
        kernel = jax.random.normal(rngs.params(), (blocks, width, width), jnp.float32) * width**-0.5
        self.kernel = nnx.Param(kernel, axes=("heads", "head", "head"))
        self.bias = nnx.Param(jnp.zeros((blocks, width), jnp.float32), axes=("heads", "head"))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        kernel = self.kernel[...].astype(self.dtype)
        parts = x.astype(self.dtype).reshape(*x.shape[:-1], *self.bias.shape)
        return (jnp.einsum("...hi,hij->...hj", parts, kernel).astype(jnp.float32) + self.bias[...]).reshape(x.shape)


class RGLRU(nnx.Module):
    """y = gelu(W_y u + b), x = conv(W_x u + b), both of E channels, the convolution without activation; from x

        r = sigmoid(W_r x + b),  i = sigmoid(W_i x + b),  a = e^{-8 r softplus(Lambda)}
        h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * x_t)
        output = W_out (y * h) + b

    with W_r and W_i block-diagonal. The first token of a document is written whole.

    Args:
      dim: D.
      width: E; None means D.
      heads: blocks of W_r and W_i.
      conv_width: taps of the convolution.
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int | None = None,
        heads: int = 16,
        conv_width: int = 4,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        width = dim if width is None else width
        checks.check_head_groups("heads", heads, "width", width)
        self.width, self.dtype, self.implementation = width, dtype, implementation
        project = lambda: Projection(dim, width, ("embed", "heads"), bias=True, dtype=dtype, rngs=rngs)  # noqa: E731
        self.y_proj, self.x_proj = project(), project()
        self.conv = ShortConvolution(width, conv_width, activation=identity, axis="heads", dtype=dtype, rngs=rngs)
        self.recurrence_gate = BlockDiagonal(width, heads, dtype=dtype, rngs=rngs)
        self.input_gate = BlockDiagonal(width, heads, dtype=dtype, rngs=rngs)
        # softplus(Lambda) = -log rho with rho^2 uniform: a starts at rho^8r
        squares = jax.random.uniform(rngs.params(), (width,), jnp.float32, 0.9**2, 0.999**2)
        self.rate = nnx.Param(inverse_softplus(-0.5 * jnp.log(squares)), axes=("heads",))
        self.out_proj = Projection(width, dim, ("heads", "embed"), bias=True, dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> RGLRUState:
        """`max_length` is of no consequence here: the state has one size."""
        memory = jnp.zeros((batch_size, self.width), jnp.float32)
        return RGLRUState(memory, self.conv.init_state(batch_size), no_document(batch_size))

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: the gates, decay and write."""
        return self.width * (4 * self.input_gate.kernel.shape[-1] + 4)

    def __call__(
        self,
        x: Hidden,
        state: RGLRUState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, RGLRUState | None]:
        """`positions` is of no consequence here: the recurrence knows the order."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        memory = tail = fresh = None
        if state is not None:
            fresh = state.document == NONE
            if segment_ids is not None:
                fresh = fresh | ~continues(segment_ids, state.document)
            state = forget_other_documents(state, segment_ids)
            memory, tail = state[:2]

        y = jax.nn.gelu(self.y_proj(x), approximate=True)
        u, tail = self.conv(self.x_proj(x), tail, segment_ids=segment_ids)
        h, memory = rg_lru(
            u,
            jax.nn.sigmoid(self.recurrence_gate(u)),
            jax.nn.sigmoid(self.input_gate(u)),
            self.rate[...],
            initial_state=memory,
            fresh=fresh,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = self.out_proj(y * h)
        if state is None or tail is None:
            return y, None
        # no tokens: the next one is still the first of its document
        document = new_document(state.document, segment_ids) if x.shape[1] else state.document
        return y, RGLRUState(memory, tail, document)


def identity(x: Array) -> Array:
    return x
