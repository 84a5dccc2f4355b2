"""How many of the keys a mechanism reads: counted, on the queries and keys of a model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax.sparse import attention
from effattn_jax.sparse.decoders import Decoder, Retro
from effattn_jax.sparse.flexprefill import flexprefill_blocks
from effattn_jax.sparse.spargeattn import spargeattn_blocks
from effattn_jax.sparse.vertical_slash import vertical_slash_estimate, vertical_slash_lists
from effattn_jax.sparse.xattention import xattention_blocks
from effattn_jax.typing import Array, Float, Int, Queries

SELECTORS: dict[str, Callable[..., Array]] = {
    "flexprefill": flexprefill_blocks,
    "xattention": xattention_blocks,
    "spargeattn": spargeattn_blocks,
}


def pairs(first: int, length: int, query_block: int, block_size: int) -> Int[np.ndarray, "N n"]:
    """Of queries at first, ..., length - 1 in blocks and keys at 0, ..., length - 1 in blocks: pairs s <= p."""
    queries = range(first, length, query_block)
    keys = np.arange(0, length, block_size)
    counts = np.zeros((len(queries), len(keys)), np.int64)
    for i, begin in enumerate(queries):
        for p in range(begin, min(begin + query_block, length)):
            counts[i] += np.clip(p + 1 - keys, 0, block_size)
    return counts


def share_of_lists(
    lists: Int[Array, "B N H n"], *, first: int = 0, length: int, query_block: int, block_size: int
) -> Float[Array, ""]:
    """Of all causal pairs of a query and a key, those in the blocks that are listed, each block once."""
    counts = pairs(first, length, query_block, block_size)
    in_list = jnp.asarray(counts / counts.sum(), jnp.float32)[:, None]
    of_block = jnp.take_along_axis(in_list[None], jnp.maximum(lists, 0), axis=3)
    return jnp.sum(jnp.where(lists >= 0, of_block, 0)) / (lists.shape[0] * lists.shape[2])


def share_of_prefill(
    name: str, options: Mapping[str, Any], q: Queries, k: Float[Array, "B T G K"], scale: float | None
) -> Float[Array, ""]:
    """Of a mechanism of `effattn_jax.sparse.prefills`, by the lists of its selector."""
    length = q.shape[1]
    if name == "streaming":
        p, s = np.arange(length)[:, None], np.arange(length)
        read = (s <= p) & ((s < options["start"]) | (p - s < options["recent"]))
        return jnp.asarray(read.sum() / (length * (length + 1) / 2), jnp.float32)
    block = options["block_size"]
    size = {"length": length, "query_block": options.get("query_block", block)}
    if name == "minference":
        columns, diagonals = vertical_slash_estimate(q, k, options["pattern"], scale=scale)
        tiles, single = vertical_slash_lists(columns, diagonals, length, length, block)
        return share_of_lists(tiles, block_size=block, **size) + share_of_lists(single, block_size=1, **size)
    return share_of_lists(SELECTORS[name](q, k, scale=scale, **options), block_size=block, **size)


def share_of_decoder(
    decoder: Decoder, q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], prompt: int
) -> Float[Array, ""]:
    """Of the keys that are there at each step behind the prompt, those that the step reads.

    The value of key s is the unit vector e_s, so that an output holds the weights of what was read. They are made
    equal by a tiny scale, which no decoder ranks by, and none of them vanishes.
    """
    if isinstance(decoder, Retro):
        decoder = dataclasses.replace(decoder, estimation=0.0)  # means stand for keys that are not read
    length = k.shape[1]
    v = jnp.broadcast_to(jnp.eye(length)[None, :, None], (*k.shape[:3], length))
    how: dict[str, Any] = {"scale": 1e-6}
    if not decoder.rotated:
        how["rotate"] = lambda x, positions: x
    cache = decoder.begin(q[:, :prompt], k[:, :prompt], v[:, :prompt], length, **how)
    weights, _ = decoder.steps(q[:, prompt:], k[:, prompt:], v[:, prompt:], cache, **how)
    there = jnp.sum(jnp.arange(prompt, length) + 1) * q.shape[0] * q.shape[2]
    return jnp.sum(weights > 0) / there


def recorder(kept: list[tuple[np.ndarray, np.ndarray]]) -> Callable[..., Array]:
    """Dense attention that leaves its queries and keys in `kept`, layer by layer."""

    def read(q: Queries, k: Array, v: Array, *, scale: float | None) -> Array:
        jax.debug.callback(lambda q, k: kept.append((np.asarray(q), np.asarray(k))), q, k)
        return attention(q, k, v, scale=scale)

    return read
