"""The last W inputs of every token, of its own document: what short convolutions and token shifts look at."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from effattn_jax.typing import Array, Float, Hidden, SegmentIds


def over_history(
    combine: Callable[[Sequence[Array]], Array],
    x: Hidden,
    state: Float[Array, "B W-1 D"] | None,
    segment_ids: SegmentIds | None,
    *,
    width: int,
) -> tuple[Hidden, Float[Array, "B W-1 D"] | None]:
    """y_t = combine(x_{t-W+1}, ..., x_t), zeros before the start of a document; and the state, the last W - 1 inputs.

    A state, if given, belongs to the first document of each row. Padding (negative ids) may stand at either end of a
    row and leaves the state as it was.
    """
    if state is None or segment_ids is None or x.shape[1] == 0:
        y, extended, _ = _combine(combine, x, state, segment_ids, width)
        return y, None if state is None else extended[:, x.shape[1] :]
    # Leading padding would stand between the state and the first token: turn it to the end, then back.
    real = segment_ids >= 0
    segment_ids = jnp.where(real, segment_ids, -1)
    leading = jnp.argmax(real, axis=1)
    turn = jax.vmap(lambda row, shift: jnp.roll(row, shift, axis=0))
    y, extended, ids = _combine(combine, turn(x, -leading), state, turn(segment_ids, -leading), width)
    last = jnp.sum(real, axis=1)[:, None] + jnp.arange(width - 1)
    tail = jnp.take_along_axis(extended, last[:, :, None], axis=1)
    # A new document may begin in the tail: what is before is not for the tokens to come.
    same = jnp.take_along_axis(ids, last, axis=1) == jnp.max(segment_ids, axis=1)[:, None]
    return turn(y, leading), jnp.where(same[:, :, None], tail, 0)


def _combine(
    combine: Callable[[Sequence[Array]], Array], x: Array, state: Array | None, segment_ids: Array | None, width: int
) -> tuple[Array, Array, Array]:
    """The outputs, and the inputs with those of the state before them, and their documents."""
    batch, length, dim = x.shape
    before = jnp.zeros_like(x, shape=(batch, width - 1, dim)) if state is None else state.astype(x.dtype)
    extended = jnp.concatenate([before, x], axis=1)
    ids = jnp.zeros(extended.shape[:2], jnp.int32)
    seen = [extended[:, i : i + length] for i in range(width)]
    if segment_ids is not None:
        first = jnp.broadcast_to(segment_ids[:, :1], (batch, width - 1))
        ids = jnp.concatenate([first, segment_ids], axis=1)
        own = [(ids[:, i : i + length] == segment_ids)[:, :, None] for i in range(width)]
        seen = [jnp.where(same, part, 0) for same, part in zip(own, seen, strict=True)]
    return combine(seen), extended, ids
