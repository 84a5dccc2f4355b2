"""Mini-batches of test-time training in rows that start anywhere, hold several documents and padding.

A document's mini-batches begin anew every `size` of its tokens. A row is cut into windows of at most `size` tokens, so
a window holds tokens of three kinds:
  open  the rest of the mini-batch that was open before the window,
  next  the beginning of the mini-batch after it, in the same document,
  fresh documents that begin in the window, each with one mini-batch at most.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.linear.chunks import to_chunks
from effattn_jax.typing import Array, Bool, Int, SegmentIds


class MiniBatches(NamedTuple):
    """Of N windows of C tokens. Padding belongs to no kind."""

    place: Int[Array, "B N C"]  # in the mini-batch, from 0
    open: Bool[Array, "B N C"]
    next: Bool[Array, "B N C"]
    fresh: Bool[Array, "B N C"]
    reads: Bool[Array, "B N C C"]  # token i and an earlier one (or itself) of its mini-batch
    leaves: Bool[Array, "B N C"]  # in the mini-batch of the window's last real token
    closes: Bool[Array, "B N"]  # that mini-batch is full


def mini_batches(
    segment_ids: SegmentIds, place: Int[Array, " B"], size: int, window: int
) -> tuple[MiniBatches, Int[Array, " B"]]:
    """`place` is that of the next token in the mini-batch that is open before the row: what it is after the row."""
    ids = to_chunks(segment_ids, window, fill=-1)
    shape, ids = ids.shape, ids.reshape(ids.shape[0], -1)
    real = ids >= 0
    first = jnp.min(jnp.where(real, ids, jnp.iinfo(ids.dtype).max), axis=1, initial=jnp.iinfo(ids.dtype).max)
    current = jax.lax.cummax(jnp.where(real, ids, first[:, None]), axis=1)
    begins = real & (ids != jnp.concatenate([first[:, None], current[:, :-1]], axis=1)[:, : ids.shape[1]])

    # Tokens of its document before each token; of the first one also those before the row.
    seen = jnp.cumsum(real, axis=1, dtype=place.dtype)
    origin = jnp.where(begins, seen - 1, -place[:, None])
    index = seen - 1 - jax.lax.cummax(origin, axis=1)
    document = jnp.cumsum(begins, axis=1)
    batch = jnp.cumsum(begins | (real & (index > 0) & (index % size == 0)), axis=1)

    def entering(x: Array) -> Array:
        last = x.reshape(shape)[:, :, -1:]
        return jnp.concatenate([jnp.zeros_like(last[:, :1]), last[:, :-1]], axis=1)[:, : shape[1]]

    entering_batch, entering_document = entering(batch), entering(document)
    real, index, document, batch = (x.reshape(shape) for x in (real, index, document, batch))
    place_of = index % size
    leaves = real & (batch == batch[:, :, -1:])
    same = (batch[:, :, :, None] == batch[:, :, None, :]) & real[:, :, None, :]
    masks = MiniBatches(
        place=place_of,
        open=real & (batch == entering_batch),
        next=real & (batch != entering_batch) & (document == entering_document),
        fresh=real & (document != entering_document),
        reads=same & jnp.tril(jnp.ones((window, window), bool)),
        leaves=leaves,
        closes=jnp.any(leaves & (place_of == size - 1), axis=-1),
    )
    end = jnp.maximum(jnp.max(origin, axis=1, initial=jnp.iinfo(place.dtype).min), -place)
    return masks, (jnp.sum(real, axis=(1, 2), dtype=place.dtype) - end) % size
