"""A sequence as chunks: [B, T, ...] padded with a neutral value and cut into [B, N, C, ...]."""

import jax.numpy as jnp

from effattn_jax.typing import Array


def to_chunks(x: Array, size: int, fill: float = 0) -> Array:
    """[B, T, ...] -> [B, N, C, ...] with N = ceil(T / C), the tail filled with `fill`."""
    length = x.shape[1]
    chunks = -(-length // size)
    x = jnp.pad(x, [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    return x.reshape(x.shape[0], chunks, size, *x.shape[2:])


def from_chunks(x: Array, length: int) -> Array:
    """[B, N, C, ...] -> [B, T, ...]: the inverse of `to_chunks`."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :length]
