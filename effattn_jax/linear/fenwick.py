"""Fenwick levels: the past of a token as blocks that double in size, the nearest ones small.

A token i reads a token j at the level of the highest binary digit in which their indices differ. A memory of n tokens
keeps one block of 2^b tokens for every digit b of n that is 1; its L-th slot also keeps whatever is older than that.
"""

import jax
import jax.numpy as jnp

from effattn_jax.typing import Array, Bool, Int, SegmentIds


def level(i: Int[Array, "..."], j: Int[Array, "..."], levels: int) -> Int[Array, "..."]:
    """l(i, j) = 0 where i = j, else floor(log2(i xor j)) + 1; the last level holds all that is further."""
    return jnp.minimum(32 - jax.lax.clz(i ^ j), levels - 1)


def slot(count: Int[Array, "..."], j: Int[Array, "..."], slots: int) -> Int[Array, "..."]:
    """Where a memory of `count` tokens keeps token j < count."""
    return jnp.minimum(31 - jax.lax.clz(count ^ j), slots - 1)


def members(count: Int[Array, "..."], slots: int) -> Int[Array, "... L"]:
    """The index of a token in each slot of a memory of `count` tokens: all tokens of a slot are at one level from any
    later token. In the last slot -1, which differs from every index in every digit above it."""
    digit = jnp.arange(slots, dtype=jnp.int32)
    above = jnp.left_shift(jnp.right_shift(count[..., None], digit + 1), digit + 1)
    return jnp.where(digit == slots - 1, -1, above)


def occupied(count: Int[Array, "..."], slots: int) -> Bool[Array, "... L"]:
    """Which slots of a memory of `count` tokens hold any."""
    digit = jnp.arange(slots, dtype=jnp.int32)
    higher = jnp.right_shift(count[..., None], digit)
    return jnp.where(digit == slots - 1, higher > 0, higher % 2 == 1)


def token_counts(segment_ids: SegmentIds, count: Int[Array, " B"]) -> Int[Array, "B T"]:
    """Tokens of its document up to each token, itself included; padding repeats the number before it.

    The first document of a row has `count` tokens before the row.
    """
    real = segment_ids >= 0
    largest = jnp.iinfo(segment_ids.dtype).max
    first = jnp.min(jnp.where(real, segment_ids, largest), axis=1, keepdims=True, initial=largest)
    document = jax.lax.cummax(jnp.where(real, segment_ids, first), axis=1)
    begins = document != jnp.concatenate([first, document[:, :-1]], axis=1)
    seen = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    before = jax.lax.cummax(jnp.where(begins, seen - 1, 0), axis=1)  # tokens of earlier documents
    return seen - before + jnp.where(before == 0, count[:, None], 0)
