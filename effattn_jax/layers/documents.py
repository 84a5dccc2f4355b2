"""Documents of packed rows as the state of a layer sees them: the one it belongs to, and when to forget it."""

import jax.numpy as jnp

from effattn_jax.typing import Array, Bool, Int, SegmentIds

NONE = -1  # the state has met no document yet


def first_document(segment_ids: SegmentIds) -> Int[Array, " B"]:
    """Id of the first real token of each row; -1 where a row is all padding."""
    segment_ids = jnp.asarray(segment_ids)
    largest = jnp.iinfo(segment_ids.dtype).max
    first = jnp.min(jnp.where(segment_ids >= 0, segment_ids, largest), axis=1, initial=largest)
    return jnp.where(first == largest, NONE, first)


def last_document(segment_ids: SegmentIds, before: Int[Array, " B"]) -> Int[Array, " B"]:
    """Id of the last real token of each row; `before` where a row is all padding."""
    last = jnp.max(segment_ids, axis=1, initial=NONE)
    return jnp.where(last >= 0, last, before)


def continues(segment_ids: SegmentIds, document: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Whether the first document of each row is the one that the state holds (or the state holds none)."""
    first = first_document(segment_ids)
    return (first == document) | (document == NONE) | (first == NONE)
