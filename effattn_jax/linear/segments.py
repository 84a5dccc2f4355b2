"""Packed rows in chunks: memory never crosses the boundary of a document, padding neither writes nor reads.

A chunk meets a boundary in three places, and each has a mask:
  inside  token i reads token j of the same chunk,
  into    token i reads the state that enters the chunk,
  out     token j is part of the state that leaves the chunk (and the entering state survives, `keep`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.typing import Array, Bool, Int


class ChunkMasks(NamedTuple):
    """Masks of N chunks of C tokens."""

    inside: Bool[Array, "B N C C"]  # same document; the order of tokens is the mechanism's own affair
    into: Bool[Array, "B N C"]
    out: Bool[Array, "B N C"]
    keep: Bool[Array, "B N"]


def chunk_masks(segment_ids: Int[Array, "B N C"]) -> ChunkMasks:
    """Masks from ids that never decrease along a row where they are not negative (negative is padding).

    The initial state belongs to the first document of the row. The state between two chunks belongs to the document of
    the last real token before it.
    """
    batch, chunks, size = segment_ids.shape
    ids = segment_ids.reshape(batch, chunks * size)
    real = ids >= 0
    first = jnp.min(jnp.where(real, ids, jnp.iinfo(ids.dtype).max), axis=1, initial=jnp.iinfo(ids.dtype).max)
    current = jax.lax.cummax(jnp.where(real, ids, first[:, None]), axis=1)
    leaving = current.reshape(batch, chunks, size)[:, :, -1]
    entering = jnp.concatenate([first[:, None], leaving[:, :-1]], axis=1)
    return ChunkMasks(
        inside=(segment_ids[:, :, :, None] == segment_ids[:, :, None, :]) & (segment_ids >= 0)[:, :, None, :],
        into=segment_ids == entering[:, :, None],
        out=segment_ids == leaving[:, :, None],
        keep=entering == leaving,
    )


def document_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """The first token of every document but the first of a row: to that one belongs the state before the row."""
    before = jnp.pad(jax.lax.cummax(jnp.maximum(segment_ids, -1), axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return (segment_ids >= 0) & (before >= 0) & (segment_ids != before)
