"""Which keys a query may read, as boolean functions of positions and documents. Masks combine with `&`."""

from typing import NamedTuple

import jax.numpy as jnp

from effattn_jax.typing import Array, Bool, Int


class Band(NamedTuple):
    """Keys j near a query at position p: all (j - p any), the past (causal), the nearest `window`.

    `window` counts the visible keys of one side with the query's own: 0 <= p - j < window if causal, else
    |p - j| < window.
    """

    causal: bool
    window: int | None

    def __call__(self, query: Int[Array, "*q"], key: Int[Array, "*k"]) -> Bool[Array, "*qk"]:
        """Broadcasts positions against each other."""
        mask = jnp.ones(jnp.broadcast_shapes(query.shape, key.shape), bool)
        if self.causal:
            mask &= key <= query
        elif self.window is not None:
            mask &= key < query + self.window
        if self.window is not None:
            mask &= key > query - self.window
        return mask

    def span(self, first: Array, last: Array, keys: int) -> tuple[Array, Array]:
        """[low, high): the keys of positions 0..keys-1 that queries first..last read."""
        low = jnp.zeros_like(first) if self.window is None else jnp.clip(first - self.window + 1, 0, keys)
        if self.causal:
            high = last + 1
        elif self.window is not None:
            high = last + self.window
        else:
            high = jnp.full_like(last, keys)
        return low, jnp.clip(high, 0, keys)

    def width(self, queries: int, keys: int) -> int:
        """The most keys that `queries` consecutive queries read together."""
        if self.window is None:
            return keys
        return min(keys, queries + (1 if self.causal else 2) * (self.window - 1))


def same_document(query_ids: Int[Array, "*q"], key_ids: Int[Array, "*k"]) -> Bool[Array, "*qk"]:
    """Tokens read within their document; padding (negative) reads nothing and nothing reads it."""
    return (query_ids == key_ids) & (key_ids >= 0)
