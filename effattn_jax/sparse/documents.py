"""Packed rows: what tokens of one document share."""

import jax
import jax.numpy as jnp

from effattn_jax.typing import Array, Float, Int


def real_only(x: Float[Array, "B T ..."], segment_ids: Int[Array, "B T"]) -> Float[Array, "B T ..."]:
    """Zeros where the token is padding, which may hold anything: 0 * NaN would reach the sums."""
    return jnp.where(segment_ids.reshape(*segment_ids.shape, *(1,) * (x.ndim - 2)) >= 0, x, 0)


def first_tokens(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Where the document of every token begins in its row; of padding, that of the document before it, or 0."""
    real = segment_ids >= 0
    latest = jax.lax.cummax(jnp.where(real, segment_ids, -1), axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    begins = real & (segment_ids != before)
    return jax.lax.cummax(jnp.where(begins, jnp.arange(segment_ids.shape[1]), 0), axis=1)
