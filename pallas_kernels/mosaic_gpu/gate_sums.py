"""Sums of the gates of scalar decay inside the chunks, and the gradient that goes back through them.

Made by XLA around the kernels: these arrays have no channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BOUNDARY = -120.0  # the gate between two documents, and of all that is stronger: e^{-120} is 0 in float32


class Sums(NamedTuple):
    """Of the gates of a chunk [B, H, N, C]: g_1 + ... + g_i and g_{i+1} + ... + g_C; which tokens are there."""

    prefix: jax.Array
    suffix: jax.Array
    real: jax.Array | None  # None: all


def sums_of_gates(log_decay: jax.Array, segment_ids: jax.Array | None, chunk: int) -> Sums:
    """Of gates [B, T, H], where T is a multiple of the chunk."""
    log_decay = jnp.maximum(log_decay, BOUNDARY)
    batch, length, heads = log_decay.shape
    chunks = lambda x: jnp.moveaxis(x, 1, 2).reshape(batch, -1, length // chunk, chunk)  # noqa: E731
    real = None
    if segment_ids is not None:
        is_there = (segment_ids >= 0)[..., None]
        log_decay = jnp.where(starts(segment_ids)[..., None], BOUNDARY, jnp.where(is_there, log_decay, 0))
        real = chunks(jnp.broadcast_to(is_there, (batch, length, heads)))
    gates = chunks(log_decay)
    after = jnp.concatenate([gates[..., 1:], jnp.zeros_like(gates[..., :1])], -1)
    return Sums(jnp.cumsum(gates, -1), jax.lax.cumsum(after, 3, reverse=True), real)


def starts(segment_ids: jax.Array) -> jax.Array:
    """The first token of every document but the first of its row."""
    before = jnp.pad(jax.lax.cummax(segment_ids, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return (segment_ids >= 0) & (before >= 0) & (segment_ids != before)


def gate_gradient(
    after: jax.Array, before: jax.Array, overlap: jax.Array, sums: Sums, segment_ids: jax.Array | None
) -> jax.Array:
    """[B, T, H]: of each token the sum of `after` from it to the end of its chunk, of `before` up to it, and what the
    chunk keeps of `overlap`; nothing comes from another document."""
    batch, heads, chunks, size = sums.prefix.shape
    after, before = (x.reshape(sums.prefix.shape) for x in (after, before))
    if segment_ids is None:
        inner = jax.lax.cumsum(after, 3, reverse=True) + jnp.cumsum(before, 3) - before
    else:
        ids = segment_ids.reshape(batch, chunks, size)
        same = (ids[..., :, None] == ids[..., None, :])[:, None]
        upper = jnp.triu(jnp.ones((size, size), bool))
        total = lambda mask, x: jnp.sum(jnp.where(same & mask, x[..., None, :], 0), -1)  # noqa: E731
        inner = total(upper, after) + total(~upper, before)
    inner = inner + (jnp.exp(sums.prefix[..., -1]) * overlap)[..., None]
    gradient = jnp.moveaxis(inner.reshape(batch, heads, -1), 1, 2)
    if segment_ids is None:
        return gradient
    return jnp.where(((segment_ids < 0) | starts(segment_ids))[..., None], 0, gradient)
