"""RetroInfer: the nearest clusters are read, those behind them are estimated (Chen et al. 2025, arXiv:2505.02922)."""

from typing import Any

import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.cluster_cache import (
    ClusterCache,
    Clustering,
    append_clusters,
    first_members,
    rank_clusters,
)
from effattn_jax.sparse.cluster_kv import always_read, attend_to_tokens, check_one_token
from effattn_jax.sparse.merge import merge
from effattn_jax.typing import Array, Float

CLUSTERING = Clustering(sink=4, clusters=512, window=1024, window_clusters=64, segment=8192)  # 16 tokens a cluster


def cached_retro(
    q: Float[Array, "B 1 H K"],
    k: Float[Array, "B 1 G K"],
    v: Float[Array, "B 1 G V"],
    cache: ClusterCache,
    *,
    clustering: Clustering = CLUSTERING,
    retrieval: float = 0.018,
    estimation: float = 0.232,
    scale: float | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B 1 H V"], ClusterCache]:
    """o = (sum_{j read} e^{s_j} v_j + sum_{c estimated} n_c e^{s_c} v_c) / (sum e^{s_j} + sum n_c e^{s_c}).

    s_c and v_c are those of the mean key and the mean value of the n_c tokens of cluster c. Read are the sinks, the
    tokens in no cluster, and the clusters with the largest s_c that are together at most `retrieval` of the capacity
    in tokens; the clusters behind them are estimated, together with those read at most retrieval + estimation of it;
    the rest is left out. Retrieval of 1 is dense attention; an estimate is exact where the keys of a cluster are alike.

    Args:
      q, k, v: of one new token, which the cache takes first.
      cache: of `prefill_clusters`, or empty.
      clustering: that of the cache.
      retrieval, estimation: shares of the cache's capacity.

    Raises:
      ValueError: more than one token, shapes that do not fit, shares that are no shares.
    """
    check_one_token(q)
    for name, share in (("retrieval", retrieval), ("estimation", estimation)):
        if not 0 <= share <= 1:
            checks.fail(name, share, "a share of the cache, from 0 to 1")
    cache = append_clusters(cache, k, v, clustering=clustering)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    capacity = cache.k.shape[1]
    exact = round(retrieval * capacity)
    ranking = rank_clusters(q, cache)
    members = first_members(ranking, cache, exact)
    read = ranking.until <= exact  # whole clusters only
    tokens = jnp.max(jnp.where(read, ranking.until, 0), axis=-1, keepdims=True)
    members = jnp.where(jnp.arange(exact) < tokens, members, -1)
    lists = jnp.concatenate([members, always_read(cache, clustering, members.shape[:2])], axis=-1)
    parts = [attend_to_tokens(q, cache, lists, scale, implementation)]
    if estimation:
        estimated = ~read & (ranking.until <= round((retrieval + estimation) * capacity)) & (ranking.size > 0)
        parts.append(_estimate(q, cache, ranking, estimated, scale))
    out, _ = merge(*zip(*parts, strict=True))
    return out, cache


def _estimate(
    q: Array, cache: ClusterCache, ranking: Any, estimated: Array, scale: float
) -> tuple[Float[Array, "B 1 H V"], Float[Array, "B 1 H"]]:
    """Out and log-sum-exp of clusters in place of their tokens."""
    s = jnp.where(estimated, scale * ranking.score + jnp.log(jnp.maximum(ranking.size, 1)), -jnp.inf)
    top = jnp.max(s, axis=-1, keepdims=True)
    p = jnp.exp(s - jnp.where(jnp.isneginf(top), 0, top))
    total = jnp.sum(p, axis=-1)
    repeats = q.shape[2] // cache.k.shape[2]
    values = jnp.repeat(cache.value_means, repeats, axis=1)
    values = jnp.take_along_axis(values, ranking.cluster[..., None], axis=2)
    out = jnp.einsum("bhc,bhcv->bhv", p, values, precision="highest") / jnp.where(total == 0, 1, total)[..., None]
    lse = jnp.where(total == 0, -jnp.inf, jnp.where(jnp.isneginf(top), 0, top)[..., 0] + jnp.log(total))
    return out[:, None].astype(q.dtype), lse[:, None]
