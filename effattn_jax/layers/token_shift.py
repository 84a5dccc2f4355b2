"""The token before (RWKV)."""

from typing import Any

import jax.numpy as jnp

from effattn_jax.layers.history import over_history
from effattn_jax.typing import Array, Float, Hidden, SegmentIds


def token_shift(
    x: Hidden, state: Float[Array, "B 1 D"] | None = None, segment_ids: SegmentIds | None = None
) -> tuple[Hidden, Float[Array, "B 1 D"] | None]:
    """y_t = x_{t-1}, zero at the start of a document; and the state, the last input."""
    return over_history(lambda seen: seen[0], x, state, segment_ids, width=2)


def init_shift(batch_size: int, dim: int, dtype: Any) -> Float[Array, "B 1 D"]:
    """The state before the first token."""
    return jnp.zeros((batch_size, 1, dim), dtype)
