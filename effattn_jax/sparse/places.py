"""Where queries are in their documents, from which blocks and windows are counted."""

from typing import NamedTuple

import jax.numpy as jnp

from effattn_jax.sparse.documents import first_tokens
from effattn_jax.typing import Array, Int


class Place(NamedTuple):
    """Rows that are alike are one, which broadcasts."""

    first: Int[Array, "B T"] | None  # position of the first token of the query's document; None: every row is one
    relative: Int[Array, "#B T"]  # position counted from there; -1 for padding


def places(length: int, keys: int, segment_ids: Int[Array, "B M"] | None) -> Place:
    """Of the last `length` tokens of `keys`."""
    position = jnp.arange(keys - length, keys)[None]
    if segment_ids is None:
        return Place(None, position)
    segment_ids = jnp.asarray(segment_ids)
    first = first_tokens(segment_ids)[:, keys - length :]
    return Place(first, jnp.where(segment_ids[:, keys - length :] >= 0, position - first, -1))


def places_from(offset: Int[Array, ""] | Int[Array, " B"], length: int, new: Int[Array, " B"] | None = None) -> Place:
    """Of tokens offset, offset + 1, ... of rows of one document; of each row the first `new` are real."""
    place = jnp.arange(length)
    relative = jnp.atleast_1d(offset)[:, None] + place
    return Place(None, relative if new is None else jnp.where(place < new[:, None], relative, -1))
