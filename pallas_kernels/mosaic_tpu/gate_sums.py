"""Sums of gates over chosen tokens of a chunk, on TPUs, and which tokens those are.

A choice is a matrix [C, C] of truths: which gates t (along axis 1, or 0 for the gradient) are in the exponent of i. The
sum is the product of the matrix with the gates, each cut into three parts of 8 bits that bfloat16 holds exactly.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu.blocks import CHUNK, dot

LEVELS = 7  # log2 of CHUNK


def indices(axis: int = 0) -> tuple[jax.Array, jax.Array]:
    """i along an axis, and what it is paired with along the other one."""
    i, t = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), a) for a in (axis, 1 - axis))
    return i, t


def pairs_of(level: int) -> jax.Array:
    """i > j that differ first in this bit."""
    i, j = indices()
    return ((i ^ j) >> level == 1) & (i > j)


def level_gates(level: int, before: bool, axis: int = 0) -> jax.Array:
    """E_h: in right halves what comes between the middle and the read, in left ones between the write and the middle.

    Both are gates of the half itself.
    """
    i, t = indices(axis)
    right = (i >> level) & 1 == 1
    return (i >> level == t >> level) & ((right & read_gates(before, axis)) | (~right & (t > i)))


def read_gates(before: bool, axis: int = 0) -> jax.Array:
    """R_i."""
    i, t = indices(axis)
    return t < i if before else t <= i


def write_gates(axis: int = 0) -> jax.Array:
    """G_C - G_i."""
    i, t = indices(axis)
    return t > i


def sums(chosen: jax.Array, parts: jax.Array) -> jax.Array:
    """[C, K] the sums of chosen tokens, [C, C], from the parts of x [C, K]."""
    of_parts = dot(chosen.astype(jnp.float32).astype(jnp.bfloat16), parts, 1, 0)
    dim = parts.shape[1] // 3
    return of_parts[:, :dim] + (of_parts[:, dim : 2 * dim] + of_parts[:, 2 * dim :])


def cut(x: jax.Array) -> jax.Array:
    """[C, 3 K] bfloat16: three parts whose sum is x, 8 bits of its 24 each."""
    parts = []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & ~0xFFFF
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return jnp.concatenate(parts, 1)


def diagonal(x: jax.Array) -> jax.Array:
    """[C, C] x on the diagonal, else 0."""
    i, j = indices()
    return jnp.where(i == j, x, 0)


def to_column(row: jax.Array) -> jax.Array:
    """[1, K] -> [K, 1], by way of tiles of eight rows."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def to_row(column: jax.Array) -> jax.Array:
    """[K, 1] -> [1, K]."""
    return jnp.broadcast_to(column, (column.shape[0], 8)).T[:1]
