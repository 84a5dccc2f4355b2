"""The weights of attention of the last queries, from which later reads are guessed."""

import jax
import jax.numpy as jnp

from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.typing import Array, Float, Int


def causal_weights(
    q: Float[Array, "B T H K"], k: Float[Array, "B M G K"], position: Int[Array, " T"], scale: float | None
) -> Float[Array, "B H T M"]:
    """softmax_j(scale * q_i . k_j) over the keys up to the queries' positions, in float32 at least; no gradients.

    Before position 0 all weights are 0.
    """
    batch, length, heads, key_dim = q.shape
    keys, groups = k.shape[1:3]
    accumulate = accumulation_dtype(q.dtype)
    q, k = (x.astype(accumulate) for x in jax.lax.stop_gradient((q, k)))
    s = contract("btgrk,bmgk->bgrtm", q.reshape(batch, length, groups, -1, key_dim), k)
    s = s.reshape(batch, heads, length, keys) * (key_dim**-0.5 if scale is None else float(scale))
    allowed = jnp.arange(keys) <= position[:, None]
    return jnp.where(allowed, jax.nn.softmax(jnp.where(allowed, s, jnp.finfo(accumulate).min), axis=-1), 0)


def last_weights(
    q: Float[Array, "B T H K"], k: Float[Array, "B M G K"], last: int, scale: float | None
) -> Float[Array, "B H L M"]:
    """Of the last L = min(last, T) queries, which are the last of the keys' positions."""
    count = min(last, q.shape[1])
    keys = k.shape[1]
    return causal_weights(q[:, q.shape[1] - count :], k, jnp.arange(keys - count, keys), scale)


def diagonal_sums(weights: Float[Array, "B H L M"]) -> Float[Array, "B H M"]:
    """sum_r of the weight that the query r of the last L positions has for the key D before it; D = 0, ..., M - 1."""
    count, keys = weights.shape[2:]
    key = jnp.arange(keys - count, keys)[:, None] - jnp.arange(keys)
    along = jnp.take_along_axis(weights, jnp.maximum(key, 0)[None, None], axis=3)
    return jnp.sum(jnp.where(key >= 0, along, 0), axis=2)


def column_sums(
    q: Float[Array, "B T H K"], k: Float[Array, "B M G K"], scale: float | None, chunk: int = 64
) -> Float[Array, "B H M"]:
    """sum_i of the weights that all T queries have for a key; some queries at a time."""
    batch, length, heads, _ = q.shape
    keys = k.shape[1]
    size = max(1, min(chunk, length))
    count = -(-length // size)
    q = jnp.pad(q, ((0, 0), (0, count * size - length), (0, 0), (0, 0)))
    position = keys - length + jnp.arange(count * size)
    position = jnp.where(position < keys, position, -1).reshape(count, size)

    def add(total: Array, of: tuple[Array, Array]) -> tuple[Array, None]:
        return total + jnp.sum(causal_weights(of[0], k, of[1], scale), axis=2), None

    zeros = jnp.zeros_like(q, shape=(batch, heads, keys), dtype=accumulation_dtype(q.dtype))
    chunks = jnp.moveaxis(q.reshape(batch, count, size, *q.shape[2:]), 1, 0)
    return jax.lax.scan(add, zeros, (chunks, position))[0]
