"""Causal depthwise convolution over a few tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.typing import Array, Float, Hidden, Int, SegmentIds


class ShortConvolution(nnx.Module):
    """y_t = f(b + sum_i w_i * x_{t - W + 1 + i}), i = 0 .. W - 1, a filter per channel, zeros before the start.

    The state holds the last W - 1 inputs [B, W - 1, D]. In packed rows a token sees only its own document; padding may
    stand at either end of a row and leaves the state as it was.
    """

    def __init__(
        self,
        dim: int,
        width: int = 4,
        *,
        activation: Callable[[Array], Array] = jax.nn.silu,
        axis: str = "heads",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if width < 1:
            checks.fail("width", width, "at least 1 tap")
        bound = width**-0.5
        taps = jax.random.uniform(rngs.params(), (width, dim), jnp.float32, -bound, bound)
        self.taps = nnx.Param(taps, axes=("conv", axis))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32), axes=(axis,))
        self.dim, self.width, self.activation, self.dtype = dim, width, activation, dtype

    def init_state(self, batch_size: int) -> Float[Array, "B W-1 D"]:
        return jnp.zeros((batch_size, self.width - 1, self.dim), self.dtype)

    def __call__(
        self, x: Hidden, state: Float[Array, "B W-1 D"] | None = None, *, segment_ids: SegmentIds | None = None
    ) -> tuple[Hidden, Float[Array, "B W-1 D"] | None]:
        """A state, if given, belongs to the first document of each row."""
        x = x.astype(self.dtype)
        if state is None or segment_ids is None or x.shape[1] == 0:
            y, extended, _ = self._convolve(x, state, segment_ids)
            return y, None if state is None else extended[:, x.shape[1] :]
        # Leading padding would stand between the state and the first token: turn it to the end, then back.
        real = segment_ids >= 0
        segment_ids = jnp.where(real, segment_ids, -1)
        leading = jnp.argmax(real, axis=1)
        turn = jax.vmap(lambda row, shift: jnp.roll(row, shift, axis=0))
        y, extended, ids = self._convolve(turn(x, -leading), state, turn(segment_ids, -leading))
        last = jnp.sum(real, axis=1)[:, None] + jnp.arange(self.width - 1)
        tail = jnp.take_along_axis(extended, last[:, :, None], axis=1)
        # A new document may begin in the tail: what is before is not for the tokens to come.
        same = jnp.take_along_axis(ids, last, axis=1) == jnp.max(segment_ids, axis=1)[:, None]
        return turn(y, leading), jnp.where(same[:, :, None], tail, 0)

    def _convolve(
        self, x: Array, state: Array | None, segment_ids: Array | None
    ) -> tuple[Array, Array, Int[Array, "B W-1+T"]]:
        """The outputs, and the inputs with those of the state before them, and their documents."""
        batch, length, _ = x.shape
        before = self.init_state(batch) if state is None else state.astype(self.dtype)
        extended = jnp.concatenate([before, x], axis=1)
        ids = jnp.zeros(extended.shape[:2], jnp.int32)
        if segment_ids is not None:
            first = jnp.broadcast_to(segment_ids[:, :1], (batch, self.width - 1))
            ids = jnp.concatenate([first, segment_ids], axis=1)
        y = self.bias[...].astype(self.dtype)
        for i, tap in enumerate(self.taps[...].astype(self.dtype)):
            seen = extended[:, i : i + length]
            if segment_ids is not None:
                seen = jnp.where((ids[:, i : i + length] == segment_ids)[:, :, None], seen, 0)
            y = y + tap * seen
        return self.activation(y), extended, ids
