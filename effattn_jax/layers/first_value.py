"""The values of the first layer, which the layers above mix into their own (value residual of RWKV-7)."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from effattn_jax.typing import Array, Bool, Float


class FirstValue(NamedTuple):
    """What a stack of layers hands up. A mixer that takes part has `value_dim` and, beside `__call__`,
    `with_first_value(x, state, first, *, segment_ids, positions) -> (y, state, first)`."""

    value: Float[Array, "B T C"]
    known: Bool[Array, ""]  # False before the first layer


def no_first_value(x: Float[Array, "B T D"], dim: int, dtype: Any) -> FirstValue:
    """What the first layer finds."""
    value = jnp.zeros_like(x, shape=(*x.shape[:2], dim), dtype=dtype)
    return FirstValue(value, jnp.zeros((), bool))


def first_or_own(first: FirstValue | None, value: Float[Array, "B T C"]) -> FirstValue:
    """The first layer's values; this layer's own where it is the first."""
    if first is not None:
        value = jnp.where(first.known, first.value, value)
    return FirstValue(value, jnp.ones((), bool))
