"""The blocks of a cache that its newest tokens list: for one token a row, these alone are touched."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.sparse.block_attention import block_attention, distinct
from effattn_jax.sparse.gathered import read_gathered
from effattn_jax.sparse.kv_buffer import of_rows
from effattn_jax.typing import Array, Float, Int, Queries


def read_blocks(
    q: Queries,
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    lists: Int[Array, "B T L n"],
    *,
    block_size: int,
    offset: Int[Array, ""] | Int[Array, " B"],
    scale: float | None,
    implementation: Implementation,
) -> Float[Array, "B T H V"]:
    """`block_attention` of queries at offset, offset + 1, ... over slots 0, 1, ..."""
    options: dict[str, Any] = {"block_size": block_size, "offset": offset, "scale": scale}
    if q.shape[1] != 1:
        return block_attention(q, k, v, lists, implementation=implementation, **options)[0]
    return dispatch("block_attention", OF_ONE, implementation, ("xla",), q, k, v, lists, **options)


def _of_one(
    q: Float[Array, "B 1 H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    lists: Int[Array, "B 1 L n"],
    *,
    block_size: int,
    offset: Int[Array, ""] | Int[Array, " B"],
    scale: float | None,
) -> Float[Array, "B 1 H V"]:
    (batch, slots, groups, _), count = k.shape, lists.shape[2]
    starts = distinct(jnp.where(lists[:, 0] < 0, slots, lists[:, 0] * block_size), slots)
    position = (starts[..., None] + jnp.arange(block_size)).reshape(batch, count, -1)
    valid = position <= jnp.minimum(of_rows(offset, batch), slots - 1)[:, None, None]
    row, group = jnp.arange(batch)[:, None, None], (jnp.arange(count) // (count // groups))[:, None]
    where = row, jnp.where(valid, position, 0), group
    k, v = (x.at[where].get(mode="promise_in_bounds") for x in (k, v))
    return read_gathered(q, k, v, valid, scale)


OF_ONE: dict[str, Callable[..., Array]] = {"xla": _of_one, "dense": _of_one}  # a list is no longer worth a mask
