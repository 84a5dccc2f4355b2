"""Positions of tokens inside their documents, counted on from call to call."""

import jax
import jax.numpy as jnp

from effattn_jax.layers.documents import first_document
from effattn_jax.typing import Array, Int, Positions, SegmentIds


def document_positions(
    shape: tuple[int, ...],
    start: Int[Array, " B"] | None,
    segment_ids: SegmentIds | None,
    positions: Positions | None = None,
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Position of each of `shape` = [B, T] tokens, and the one that comes next in each row.

    Args:
      shape: (B, T).
      start: the first position of the first document of each row; None is 0.
      segment_ids: other documents start at 0; padding is not counted.
      positions: taken instead, if given.
    """
    batch, length = shape
    start = jnp.zeros((batch,), jnp.int32) if start is None else start
    if length == 0:
        return jnp.zeros(shape, jnp.int32), start
    if segment_ids is None:
        counted = start[:, None] + jnp.arange(length)
        last = jnp.full((batch,), length - 1)
        any_real = jnp.ones((batch,), bool)
    else:
        real = segment_ids >= 0
        rank = jnp.cumsum(real, axis=1, dtype=jnp.int32)  # of real tokens, from 1
        document = jax.lax.cummax(jnp.where(real, segment_ids, -1), axis=1)
        begins = document != jnp.concatenate([first_document(segment_ids)[:, None], document[:, :-1]], axis=1)
        before = jax.lax.cummax(jnp.where(begins & real, rank - 1, 0), axis=1)
        first = document == first_document(segment_ids)[:, None]
        counted = jnp.maximum(rank - 1 - before, 0) + jnp.where(first, start[:, None], 0)
        last = length - 1 - jnp.argmax(real[:, ::-1], axis=1)
        any_real = rank[:, -1] > 0
    positions = counted if positions is None else jnp.broadcast_to(positions, shape)
    following = jnp.take_along_axis(positions, last[:, None], axis=1)[:, 0] + 1
    return positions, jnp.where(any_real, following, start).astype(jnp.int32)
