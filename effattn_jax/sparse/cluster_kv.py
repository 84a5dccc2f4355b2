"""ClusterKV: a token reads the clusters of keys that are nearest to its query (Liu et al. 2024, arXiv:2412.03213)."""

import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.cluster_cache import (
    ClusterCache,
    Clustering,
    append_clusters,
    first_members,
    rank_clusters,
)
from effattn_jax.typing import Array, Float, Int


def cached_cluster_kv(
    q: Float[Array, "B 1 H K"],
    k: Float[Array, "B 1 G K"],
    v: Float[Array, "B 1 G V"],
    cache: ClusterCache,
    *,
    clustering: Clustering,
    budget: int = 1024,
    scale: float | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B 1 H V"], ClusterCache]:
    """Softmax attention over the sinks, the tokens of the clusters with the largest q . mu_c, and those in no cluster.

    Every query head ranks the clusters of its key head, and takes them whole until sinks and members are `budget`
    tokens; the last one is cut. The tokens in no cluster yet, fewer than `clustering.window`, come on top. A budget of
    the whole row is dense attention.

    Args:
      q, k, v: of one new token, which the cache takes first.
      cache: of `prefill_clusters`, or empty.
      clustering: that of the cache.
      budget: tokens, the sinks counted.

    Raises:
      ValueError: more than one token, shapes that do not fit, a budget that the sinks use up.
    """
    check_one_token(q)
    if budget <= clustering.sink:
        checks.fail("budget", budget, f"more than the {clustering.sink} sinks")
    cache = append_clusters(cache, k, v, clustering=clustering)
    members = first_members(rank_clusters(q, cache), cache, min(budget, cache.k.shape[1]) - clustering.sink)
    lists = jnp.concatenate([members, always_read(cache, clustering, members.shape[:2])], axis=-1)
    out, _ = attend_to_tokens(q, cache, lists, scale, implementation)
    return out, cache


def check_one_token(q: Array) -> None:
    checks.check_rank("q", q, 4, "[B, 1, H, K]")
    if q.shape[1] != 1:
        checks.fail("q", f"{q.shape[1]} tokens", "one token: a prompt is read by dense attention")


def always_read(cache: ClusterCache, clustering: Clustering, heads: tuple[int, ...]) -> Int[Array, "B H n"]:
    """The sinks, and what is in no cluster; -1 for what does not exist."""
    sinks = jnp.arange(clustering.sink)
    newest = jnp.maximum(cache.clustered, clustering.sink) + jnp.arange(clustering.window)
    tokens = jnp.concatenate([sinks, newest])
    return jnp.broadcast_to(jnp.where(tokens < cache.length, tokens, -1), (*heads, len(tokens)))


def attend_to_tokens(
    q: Float[Array, "B 1 H K"],
    cache: ClusterCache,
    lists: Int[Array, "B H n"],
    scale: float | None,
    implementation: Implementation,
) -> tuple[Float[Array, "B 1 H V"], Float[Array, "B 1 H"]]:
    """The query of the newest token over the tokens of its head's list."""
    return block_attention(
        q,
        cache.k,
        cache.v,
        lists[:, None],
        block_size=1,
        offset=cache.length - 1,
        scale=scale,
        implementation=implementation,
    )
