"""A block of the residual stream: a mixer over tokens, then a feed-forward layer over channels."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers import FEED_FORWARDS, MIXERS, RMSNorm
from effattn_jax.layers.first_value import FirstValue
from effattn_jax.typing import Array, Hidden, Positions, SegmentIds


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); without the second half where `mlp_dim` is 0.

    `mixer` is a name of `effattn_jax.layers.MIXERS`, `mlp` one of `FEED_FORWARDS`. Layers whose constructor has
    `layer_index` and `layer_count` are told their place in the stack. The state is the mixer's, or a pair where the
    feed-forward layer has one too.
    """

    def __init__(
        self,
        dim: int,
        mixer: str,
        options: Mapping[str, Any],
        *,
        mlp_dim: int,
        mlp: str = "swiglu",
        layer_index: int | Array = 0,
        layer_count: int = 1,
        norm_eps: float = 1e-6,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if mixer not in MIXERS:
            checks.fail("mixer", repr(mixer), f"one of {', '.join(sorted(MIXERS))}")
        if mlp not in FEED_FORWARDS:
            checks.fail("mlp", repr(mlp), f"one of {', '.join(sorted(FEED_FORWARDS))}")
        place = {"layer_index": layer_index, "layer_count": layer_count}
        self.norm = RMSNorm(dim, eps=norm_eps, dtype=dtype)
        try:
            self.mixer = MIXERS[mixer](dim, **_accepted(MIXERS[mixer], place) | dict(options), dtype=dtype, rngs=rngs)
        except TypeError as error:  # an option the mixer does not have
            raise checks.ArgumentError(f"mixer {mixer!r}: {error}") from error
        self.mlp_norm = RMSNorm(dim, eps=norm_eps, dtype=dtype) if mlp_dim else None
        feed_forward = FEED_FORWARDS[mlp]
        self.mlp: Any = (
            feed_forward(dim, mlp_dim, **_accepted(feed_forward, place), dtype=dtype, rngs=rngs) if mlp_dim else None
        )

    def init_state(self, batch_size: int, max_length: int) -> Any:
        state = self.mixer.init_state(batch_size, max_length)
        if self.mlp is None or not hasattr(self.mlp, "init_state"):
            return state
        return state, self.mlp.init_state(batch_size, max_length)

    def __call__(
        self,
        x: Hidden,
        state: Any = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, Any]:
        x, state, _ = self.with_first_value(x, state, None, segment_ids=segment_ids, positions=positions)
        return x, state

    def with_first_value(
        self,
        x: Hidden,
        state: Any,
        first: FirstValue | None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, Any, FirstValue | None]:
        """The block in a stack whose first layer's values go up to the others."""
        where = {"segment_ids": segment_ids, "positions": positions}
        stateful = self.mlp is not None and hasattr(self.mlp, "init_state")
        mixer_state, mlp_state = state if stateful and state is not None else (state, None)
        if hasattr(self.mixer, "with_first_value"):
            y, mixer_state, first = self.mixer.with_first_value(self.norm(x), mixer_state, first, **where)
        else:
            y, mixer_state = self.mixer(self.norm(x), mixer_state, **where)
        x = x + y
        if self.mlp is None or self.mlp_norm is None:
            return x, mixer_state, first
        if not stateful:
            return x + self.mlp(self.mlp_norm(x)), mixer_state, first
        y, mlp_state = self.mlp(self.mlp_norm(x), mlp_state, **where)
        return x + y, None if state is None else (mixer_state, mlp_state), first


def _accepted(layer: Any, place: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in place.items() if name in inspect.signature(layer.__init__).parameters}
