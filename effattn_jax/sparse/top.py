"""The highest entries of a row of scores, as lists."""

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.typing import Array, Float, Int


def top_entries(scores: Float[Array, "*rows n"], count: int) -> Int[Array, "*rows count"]:
    """The `count` highest, highest first and of equals the lowest index first; -1 for what has -inf or is not there."""
    scores = jnp.where(scores == 0, 0, scores)  # -0.0 would come behind 0.0
    values, indices = jax.lax.top_k(scores, min(count, scores.shape[-1]))
    indices = jnp.where(jnp.isneginf(values), -1, indices)
    missing = count - indices.shape[-1]
    return jnp.pad(indices, [(0, 0)] * (indices.ndim - 1) + [(0, missing)], constant_values=-1)


def top_blocks(
    scores: Float[Array, "B T G n"],
    relative: Int[Array, "#B T"],
    *,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
) -> Int[Array, "B T G topk"]:
    """The first `init_blocks` blocks, the last `local_blocks` up to the query's own, then the highest scores before it.

    Blocks are counted from the document's first token, where `relative` is 0. Fewer than topk are filled up with -1.
    """
    own = (relative // block_size)[..., None, None]
    block = jnp.arange(scores.shape[-1])
    scores = jnp.where((block < init_blocks) | (own - block < local_blocks), jnp.inf, scores)
    return top_entries(jnp.where(block <= own, scores, -jnp.inf), topk)


def check_budget(topk: int, init_blocks: int, local_blocks: int) -> None:
    """`topk` counts what is forced."""
    for name, count, least in (("topk", topk, 1), ("init_blocks", init_blocks, 0), ("local_blocks", local_blocks, 1)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            checks.fail(name, count, f"an int of at least {least}")
    if topk < init_blocks + local_blocks:
        checks.fail("topk", topk, f"at least the {init_blocks} initial and {local_blocks} local blocks that it counts")
