"""Documents of packed rows as the state of a layer sees them: the one it belongs to, and when to forget it."""

from typing import NamedTuple

import jax
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


def forget_other_documents[State: NamedTuple](state: State, segment_ids: SegmentIds | None) -> State:
    """The state, a NamedTuple of [B, ...] with a field `document`, as the first document of each row finds it: zeros
    where that is not the one the state holds."""
    if segment_ids is None:
        return state
    document = state.document  # type: ignore[attr-defined]
    keep = continues(segment_ids, document)
    clear = lambda x: jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)  # noqa: E731
    return jax.tree.map(clear, state)._replace(document=document)


def new_document(document: Int[Array, " B"], segment_ids: SegmentIds | None) -> Int[Array, " B"]:
    """The document that a state holds after these tokens. Tokens without ids continue it, at first document 0."""
    return jnp.maximum(document, 0) if segment_ids is None else last_document(segment_ids, document)


def no_document(batch_size: int) -> Int[Array, " B"]:
    """Of a state before the first token."""
    return jnp.full((batch_size,), NONE, jnp.int32)
