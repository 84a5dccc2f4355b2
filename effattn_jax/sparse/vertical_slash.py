"""Columns and diagonals of the causal triangle: which ones a head reads, by its last queries, and the reading.

Diagonals are read in tiles, blocks of queries by blocks of keys; columns outside of the tiles as single keys.
"""

from typing import NamedTuple

import jax.numpy as jnp

from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.block_masks import block_causal, lists_of
from effattn_jax.sparse.last_weights import diagonal_sums, last_weights
from effattn_jax.sparse.merge import merge
from effattn_jax.sparse.top import top_entries
from effattn_jax.typing import Array, Float, Int, Queries


class VerticalSlash(NamedTuple):
    """Numbers of columns and diagonals; those that are forced count."""

    vertical: int = 1000
    slash: int = 6096
    last_queries: int = 64
    forced_columns: int = 30  # the first
    forced_diagonals: int = 100  # the nearest
    least_vertical: int = 30
    least_slash: int = 50


def vertical_slash_estimate(
    q: Queries, k: Float[Array, "B M G K"], pattern: VerticalSlash, *, scale: float | None = None
) -> tuple[Int[Array, "B H n_v"], Int[Array, "B H n_s"]]:
    """The columns c and diagonals D = p - j with the greatest sums of the weights A of the last L queries,

        V_c = sum_r A_rc    and    S_D = sum_r A_{r, p_r - D},

    greatest first, of equal ones the lowest; the forced ones are the greatest.
    """
    keys = k.shape[1]
    weights = last_weights(q, k, pattern.last_queries, scale)
    place = jnp.arange(keys)
    columns = jnp.where(place < pattern.forced_columns, jnp.inf, jnp.sum(weights, axis=2))
    diagonals = jnp.where(place < pattern.forced_diagonals, jnp.inf, diagonal_sums(weights))
    return (
        top_entries(columns, min(keys, max(pattern.vertical, pattern.least_vertical))),
        top_entries(diagonals, min(keys, max(pattern.slash, pattern.least_slash))),
    )


def vertical_slash_lists(
    columns: Int[Array, "B H n_v"], diagonals: Int[Array, "B H n_s"], length: int, keys: int, block_size: int
) -> tuple[Int[Array, "B N H n"], Int[Array, "B N H n_v"]]:
    """The blocks of keys that the diagonals of a block of queries touch, and the columns outside of these blocks.

    The queries are the last `length` of `keys` positions; blocks of queries begin with the first of them.
    """
    before, inside = divmod(keys - length, block_size)
    own = before + jnp.arange(-(-length // block_size))  # block of keys in which a block of queries begins
    block = jnp.arange(-(-keys // block_size))
    # a diagonal touches the same blocks of keys, counted back from the own one, in every block of queries
    ends = [(inside + row - diagonals) // block_size for row in (0, block_size - 1)]
    back = 1 - jnp.concatenate(ends, axis=-1)  # 0 is the block after the own one
    batch, heads, _ = back.shape
    touched = jnp.zeros((batch, heads, len(block) + 2), bool)
    touched = touched.at[jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None], back].set(True)
    distance = own[:, None] - block + 1
    tiles = touched[:, :, jnp.maximum(distance, 0)] & (distance >= 0)
    tiles &= block_causal(length, keys, block_size, block_size)
    of_column = jnp.broadcast_to((columns // block_size)[:, :, None], (batch, heads, len(own), columns.shape[2]))
    covered = jnp.take_along_axis(tiles, of_column, axis=3)
    single = jnp.where(covered, -1, columns[:, :, None])
    return lists_of(tiles)[..., : back.shape[2]], jnp.moveaxis(single, 1, 2)


def vertical_slash_attention(
    q: Queries,
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    pattern: VerticalSlash,
    *,
    block_size: int = 64,
    scale: float | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Out and log-sum-exp over the tiles and the columns, each key once: all of the estimated columns and diagonals,
    and what else of the past is in the tiles."""
    columns, diagonals = vertical_slash_estimate(q, k, pattern, scale=scale)
    tiles, single = vertical_slash_lists(columns, diagonals, q.shape[1], k.shape[1], block_size)

    def read(lists: Array, size: int) -> tuple[Array, Array]:
        return block_attention(
            q, k, v, lists, block_size=size, query_block=block_size, scale=scale, implementation=implementation
        )

    parts = read(tiles, block_size), read(single, 1)
    return merge([out for out, _ in parts], [lse for _, lse in parts])
