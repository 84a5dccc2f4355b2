"""A recurrence, token by token, for a memory of any shape: the readable oracle of every faster form."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax.typing import Array, Bool, SegmentIds

Step = Callable[[Any, Any], tuple[Any, Any]]


def recurrence(
    step: Step, state: Any, tokens: Any, segment_ids: SegmentIds | None = None, fresh: Any = None
) -> tuple[Any, Any]:
    """`step(state, token) -> (state, out)` over the tokens of each row, by `lax.scan`.

    Args:
      step: one token of every row: leaves of `state` and `token` are [B, ...].
      state: the memory of the first document of each row, a pytree of [B, ...].
      tokens: a pytree of [B, T, ...].
      segment_ids: [B, T]. A document that begins finds `fresh` instead of the state; padding (negative ids) leaves the
        state as it was and reads zeros.
      fresh: a pytree like `state`; None means zeros.

    Returns:
      (out, state): a pytree of [B, T, ...] and the last state. The backward pass keeps a state per sqrt(T) tokens.
    """
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    if segment_ids is None:
        state, out = scan_checkpointed(step, state, tokens)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out), state
    fresh = jax.tree.map(jnp.zeros_like, state) if fresh is None else fresh

    def packed_step(carry: tuple[Any, Array], token: tuple[Any, Array]) -> tuple[tuple[Any, Array], Any]:
        (state, document), (token, segment) = carry, token
        real = segment >= 0
        begins = real & (document >= 0) & (segment != document)
        new_state, out = step(select(begins, fresh, state), token)
        out = select(real, out, jax.tree.map(jnp.zeros_like, out))
        return (select(real, new_state, state), jnp.where(real, segment, document)), out

    no_document = jnp.full_like(segment_ids, -1, shape=segment_ids.shape[:1])
    (state, _), out = scan_checkpointed(packed_step, (state, no_document), (tokens, jnp.moveaxis(segment_ids, 1, 0)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out), state


def select(rows: Bool[Array, " B"], a: Any, b: Any) -> Any:
    """`a` in the rows where it is true, else `b`: pytrees of [B, ...]."""
    return jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, y), a, b)


def scan_checkpointed(step: Step, carry: Any, tokens: Any) -> tuple[Any, Any]:
    """`lax.scan` whose backward pass keeps a carry per sqrt(T) tokens instead of one per token."""
    length = jax.tree.leaves(tokens)[0].shape[0]
    if length == 1:
        carry, out = step(carry, jax.tree.map(lambda x: x[0], tokens))
        return carry, jax.tree.map(lambda x: x[None], out)
    inner = max(1, math.isqrt(length))
    whole = length // inner * inner
    head = jax.tree.map(lambda x: x[:whole].reshape(whole // inner, inner, *x.shape[1:]), tokens)
    tail = jax.tree.map(lambda x: x[whole:], tokens)
    scan = jax.checkpoint(lambda carry, block: jax.lax.scan(step, carry, block))
    carry, out = jax.lax.scan(scan, carry, head)
    out = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), out)
    if whole == length:
        return carry, out
    carry, out_tail = scan(carry, tail)
    return carry, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), out, out_tail)
