"""What the kernels of scalar decay need of the gates of every chunk, and the gradient of a gate from what they return.

A plain float32 sum G of gates loses 6e-8 |G|: after a few gates of -30 the decay between two mild neighbours is off by
1e-5. So a gate is split into a multiple of 1/256, whose sums are exact below 2^16, and a small rest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64
STEP = 1 / 256


class Gates(NamedTuple):
    """Of a row of N chunks; G_i = g_1 + ... + g_i inside a chunk, and every exponent is <= 0."""

    steps: jax.Array  # [B, H, N C]: G = STEP * steps + fine, steps are whole
    fine: jax.Array  # [B, H, N C]
    read: jax.Array  # [B, H, N C]: e^{G_i}, of the state that enters the chunk; 0 where it is another document's
    write: jax.Array  # [B, H, N C]: e^{G_C - G_i}, to the state that leaves; 0 where it is another document's
    keep: jax.Array  # [B, H, N]: e^{G_C}, of the state that enters in the one that leaves
    documents: jax.Array  # [B, N C], int32: counted from 0 along a row, -1 for tokens that are not there


def gates(log_decay: jax.Array, segment_ids: jax.Array | None) -> Gates:
    """From log_decay [B, T, H] in float32 and segment_ids [B, T], or None for one document a row."""
    batch, length, heads = log_decay.shape
    chunks = -(-length // CHUNK)
    tail = chunks * CHUNK - length
    ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    real = jnp.pad(ids >= 0, ((0, 0), (0, tail)))
    number = jnp.pad(jnp.cumsum(document_starts(ids), 1, dtype=jnp.int32), ((0, 0), (0, tail)), mode="edge")
    ends = number[:, CHUNK - 1 :: CHUNK]
    enters = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))
    documents = jnp.where(real, number, -1)

    g = jnp.where(real[:, :, None], jnp.pad(log_decay, ((0, 0), (0, tail), (0, 0))), 0)
    g = jnp.moveaxis(g, 1, 2).reshape(batch, heads, chunks, CHUNK)
    whole = jnp.round(g / STEP)
    steps, fine = jnp.cumsum(whole, -1), jnp.cumsum(g - whole * STEP, -1)
    to_end = STEP * (steps[..., -1:] - steps) + (fine[..., -1:] - fine)
    total = STEP * steps + fine
    in_chunks = documents.reshape(batch, 1, chunks, CHUNK)
    read = jnp.where(in_chunks == enters[:, None, :, None], jnp.exp(total), 0)
    write = jnp.where(in_chunks == ends[:, None, :, None], jnp.exp(to_end), 0)
    keep = jnp.where((enters == ends)[:, None], jnp.exp(total[..., -1]), 0)
    row = lambda x: x.reshape(batch, heads, chunks * CHUNK)  # noqa: E731
    return Gates(row(steps), row(fine), row(read), row(write), keep, documents)


def document_starts(segment_ids: jax.Array) -> jax.Array:
    """[B, T]: the first token of every document but the first of its row."""
    before = jnp.pad(jax.lax.cummax(segment_ids, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return (segment_ids >= 0) & (before >= 0) & (segment_ids != before)


def gate_gradient(
    after: jax.Array, before: jax.Array, overlap: jax.Array, keep: jax.Array, segment_ids: jax.Array | None, length: int
) -> jax.Array:
    """dg_t = sum_{i >= t} after_i + sum_{j < t} before_j + keep overlap, inside each chunk: [B, T, H].

    Args:
      after: [B, H, N C], what grows with the gates up to a token less what shrinks with them.
      before: [B, H, N C], what grows with the gates behind a token.
      overlap: [B, H, N], <S, dS'> of the state that enters and the gradient of the state that leaves.
    """
    after, before = (x.reshape(*keep.shape, CHUNK) for x in (after, before))
    # Not the sum up to t less before_t: under strong gates that one is all of it.
    earlier = jnp.pad(before[..., :-1], ((0, 0), (0, 0), (0, 0), (1, 0)))
    inner = jax.lax.cumsum(after, 3, reverse=True) + jnp.cumsum(earlier, 3)
    gradient = (inner + (keep * overlap)[..., None]).reshape(*keep.shape[:2], -1)
    gradient = jnp.moveaxis(gradient, 1, 2)[:, :length]
    if segment_ids is None:
        return gradient
    # Nothing decays at the start of a document; sums over others than a token's own cancel but for rounding.
    return jnp.where(((segment_ids < 0) | document_starts(segment_ids))[..., None], 0, gradient)
