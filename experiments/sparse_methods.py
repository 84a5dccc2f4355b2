"""The mechanisms of `sparse_quality`, each with the options that a budget stands for, and random choice."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.sparse import attention, block_attention
from effattn_jax.sparse.block_masks import lists_of, ranks
from effattn_jax.sparse.cluster_cache import Clustering
from effattn_jax.sparse.vertical_slash import VerticalSlash
from effattn_jax.typing import Array, Float, Int, Queries

RANDOM = "random"
Options = dict[str, Any]


class Sizes(NamedTuple):
    keys: int  # of a row
    block: int  # keys that are chosen together at prefill
    page: int  # and at decoding


def prefill_options(share: float, sizes: Sizes) -> dict[str, Options]:
    """By mechanism. A share of 1 reads everything. Mechanisms that read until a threshold is met have one that grows
    with the share; what they then read is counted, as for all others."""
    keys, block = sizes.keys, sizes.block
    threshold = share**0.25 if share < 1 else 1.1
    lines = VerticalSlash(
        vertical=round(share * keys),
        slash=block + round(share * keys / (2 * block)),
        last_queries=min(64, keys),
        forced_columns=2,
        forced_diagonals=block,
        least_vertical=1,
        least_slash=1,
    )
    return {
        "minference": {"pattern": lines, "block_size": block},
        "flexprefill": {"gamma": threshold, "min_budget": block, "block_size": block},
        "xattention": {"tau": threshold, "stride": 4, "block_size": block},
        "spargeattn": {"topk": share, "query_block": 2 * block, "block_size": block},
        "streaming": streaming_options(share, keys),
        RANDOM: {"share": share, "block": block},
    }


def decode_options(share: float, sizes: Sizes) -> dict[str, Options]:
    """By mechanism. A share of 1 reads everything."""
    keys, page = sizes.keys, sizes.page
    budget = max(page, round(share * keys) // page * page)
    clustering = Clustering(sink=4, clusters=keys // page, window=2 * page, window_clusters=2, iterations=10)
    return {
        "quest": {"budget": budget, "page_size": page},
        "double_sparsity": {"heavy": budget, "page_size": page},
        "h2o": {"heavy": budget // 2, "recent": budget - budget // 2},
        "snapkv": {"capacity": budget, "window": min(16, budget // 2)},
        "cluster_kv": {"budget": budget, "clustering": clustering},
        "retro": {"retrieval": share, "estimation": min(0.232, 1 - share), "clustering": clustering},
        "streaming": streaming_options(share, keys),
        RANDOM: {"share": share, "block": page},
    }


def streaming_options(share: float, keys: int) -> Options:
    return {"start": 4, "recent": max(4, round(share * keys)) - 4 or 1}


def side_share(method: str, options: Mapping[str, Any], keys: int, key_dim: int) -> float:
    """What a decoding step reads to choose, in keys, as a share of the keys: bounds, labels, means of clusters."""
    match method:
        case "quest":
            return 2 / options["page_size"]
        case "double_sparsity":
            return (key_dim // 4) / key_dim
        case "cluster_kv" | "retro":
            return options["clustering"].clusters / keys
    return 0.0


def random_lists(q: Queries, blocks: int, own: Int[Array, " N"], share: float) -> Int[Array, "B N H n"]:
    """The own block, and of those before it as many at random as make `share` of them all, by random rounding."""
    shape = (q.shape[0], q.shape[2], len(own), blocks)
    # drawn by the queries: every layer and every batch has numbers of its own
    key = jax.random.key(jax.lax.bitcast_convert_type(jnp.sum(q, dtype=jnp.float32), jnp.int32))
    order, rounding = jax.random.split(key)
    block = jnp.arange(blocks)
    score = jnp.where(block < own[:, None], jax.random.uniform(order, shape), -jnp.inf)
    score = jnp.where(block == own[:, None], jnp.inf, score)
    count = jnp.floor(share * (own + 1) + jax.random.uniform(rounding, shape[:3]))
    return lists_of((ranks(score) < jnp.maximum(count, 1)[..., None]) & (block <= own[:, None]))


def read_randomly(
    share: float, block: int, first: int, query_block: int, count: Callable[[Array], None]
) -> Callable[..., Array]:
    """Attention that reads everything up to position `first`, and random blocks from there on.

    Args:
      query_block: queries that read the same blocks.
      count: is given the lists.
    """

    def read(q: Queries, k: Array, v: Array, *, scale: float | None) -> Float[Array, "B T H V"]:
        length = q.shape[1]
        own = (first + query_block * jnp.arange(math.ceil((length - first) / query_block))) // block
        lists = random_lists(q[:, first:], math.ceil(length / block), own, share)
        count(lists)
        chosen, _ = block_attention(q[:, first:], k, v, lists, block_size=block, query_block=query_block, scale=scale)
        if not first:
            return chosen
        return jnp.concatenate([attention(q[:, :first], k[:, :first], v[:, :first], scale=scale), chosen], axis=1)

    return read
