"""Causal depthwise convolution over a few tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers.history import over_history
from effattn_jax.typing import Array, Float, Hidden, SegmentIds


class ShortConvolution(nnx.Module):
    """y_t = f(b + sum_i w_i * x_{t - W + 1 + i}), i = 0 .. W - 1, a filter per channel, zeros before the start;
    in float32.

    The state holds the last W - 1 inputs [B, W - 1, D]. In packed rows a token sees only its own document; padding may
    stand at either end of a row and leaves the state as it was.
    """

    def __init__(
        self,
        dim: int,
        width: int = 4,
        *,
        activation: Callable[[Array], Array] = jax.nn.silu,
        bias: bool = True,
        axis: str = "heads",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if width < 1:
            checks.fail("width", width, "at least 1 tap")
        bound = width**-0.5
        taps = jax.random.uniform(rngs.params(), (width, dim), jnp.float32, -bound, bound)
        self.taps = nnx.Param(taps, axes=("conv", axis))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32), axes=(axis,)) if bias else None
        self.dim, self.width, self.activation, self.dtype = dim, width, activation, dtype

    def init_state(self, batch_size: int) -> Float[Array, "B W-1 D"]:
        return jnp.zeros((batch_size, self.width - 1, self.dim), self.dtype)

    def __call__(
        self, x: Hidden, state: Float[Array, "B W-1 D"] | None = None, *, segment_ids: SegmentIds | None = None
    ) -> tuple[Hidden, Float[Array, "B W-1 D"] | None]:
        """A state, if given, belongs to the first document of each row."""
        return over_history(self._filter, x.astype(self.dtype), state, segment_ids, width=self.width)

    def _filter(self, seen: Sequence[Array]) -> Array:
        y = jnp.zeros((), jnp.float32) if self.bias is None else self.bias[...]
        for tap, x in zip(self.taps[...], seen, strict=True):
            y = y + tap * x.astype(jnp.float32)
        return self.activation(y).astype(self.dtype)
