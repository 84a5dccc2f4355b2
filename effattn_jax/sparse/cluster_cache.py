"""A cache whose tokens are sorted into clusters of like keys, which a query ranks before it reads any of them.

The first `sink` tokens and the newest ones are in no cluster. Once there are `window` new tokens they become clusters
of their own, behind those that exist.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.sparse.kmeans import means, spherical_kmeans
from effattn_jax.sparse.kv_buffer import check_room, check_sizes, write
from effattn_jax.typing import Array, Float, Int


class Clustering(NamedTuple):
    """How tokens become clusters; fixed for a cache."""

    sink: int = 16  # first tokens, which are always read
    clusters: int = 400  # of a prompt
    window: int = 320  # new tokens that become clusters together
    window_clusters: int = 8
    segment: int | None = None  # tokens of a prompt that are clustered together; None: all
    iterations: int = 20
    seed: int = 0


class ClusterCache(NamedTuple):
    """S slots per row; C clusters per row and key head. Rows have the same length."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    key_means: Float[Array, "B G C K"]  # float32
    value_means: Float[Array, "B G C V"]  # float32
    sizes: Int[Array, "B G C"]
    members: Int[Array, "B G S"]  # tokens, cluster by cluster
    clusters: Int[Array, ""]
    clustered: Int[Array, ""]  # tokens up to here are sinks or in clusters
    length: Int[Array, ""]


def init_cluster_cache(
    batch: int,
    capacity: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    *,
    clustering: Clustering = Clustering(),  # noqa: B008
    dtype: Any = jnp.bfloat16,
) -> ClusterCache:
    """An empty cache of `capacity` tokens."""
    value_dim = key_dim if value_dim is None else value_dim
    check_sizes(batch=batch, capacity=capacity, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim)
    fields = clustering._asdict()
    sink, segment = fields.pop("sink"), fields.pop("segment")
    del fields["seed"]
    check_sizes(**fields)
    if sink < 0 or (segment is not None and segment < 1):
        checks.fail("clustering", clustering, "sink >= 0 and a segment of at least 1 token")
    segments = 1 if segment is None else -(-capacity // segment)
    total = segments * clustering.clusters + capacity // clustering.window * clustering.window_clusters
    zeros = jnp.zeros((), jnp.int32)
    return ClusterCache(
        jnp.zeros((batch, capacity, kv_heads, key_dim), dtype),
        jnp.zeros((batch, capacity, kv_heads, value_dim), dtype),
        jnp.zeros((batch, kv_heads, total, key_dim), jnp.float32),
        jnp.zeros((batch, kv_heads, total, value_dim), jnp.float32),
        jnp.zeros((batch, kv_heads, total), jnp.int32),
        jnp.zeros((batch, kv_heads, capacity), jnp.int32),
        zeros,
        zeros,
        zeros,
    )


def prefill_clusters(
    cache: ClusterCache, k: Float[Array, "B T G K"], v: Float[Array, "B T G V"], *, clustering: Clustering
) -> ClusterCache:
    """The empty cache with a prompt, whose tokens behind the sinks become clusters at once."""
    length = k.shape[1]
    _check(cache, k, v)
    if not isinstance(cache.length, jax.core.Tracer) and int(cache.length):
        checks.fail("cache", f"{int(cache.length)} tokens", "an empty cache")
    cache = _write(cache, k, v)
    step = max(1, length if clustering.segment is None else clustering.segment)
    start = min(clustering.sink, length)
    cache = cache._replace(clustered=jnp.asarray(start, jnp.int32))
    while start < length:
        size = min(step, length - start)
        cache = _cluster(cache, size, clustering.clusters, clustering)
        start += size
    return cache


def append_clusters(
    cache: ClusterCache, k: Float[Array, "B T G K"], v: Float[Array, "B T G V"], *, clustering: Clustering
) -> ClusterCache:
    """The cache with T new tokens; any split into calls gives the same."""
    _check(cache, k, v)
    cache = _write(cache, k, v)
    cache = cache._replace(clustered=jnp.maximum(cache.clustered, jnp.minimum(clustering.sink, cache.length)))
    if clustering.window > cache.k.shape[1]:  # never reached
        return cache
    return jax.lax.while_loop(
        lambda cache: cache.length - cache.clustered >= clustering.window,
        lambda cache: _cluster(cache, clustering.window, clustering.window_clusters, clustering),
        cache,
    )


def _check(cache: ClusterCache, k: Array, v: Array) -> None:
    batch, capacity, groups, key_dim = cache.k.shape
    checks.check_shape("k", k, (batch, None, groups, key_dim), "[B, T, G, K] of the cache")
    checks.check_shape("v", v, (batch, k.shape[1], groups, cache.v.shape[3]), "[B, T, G, V] of the cache")
    check_room(cache.length, capacity, k.shape[1])


def _write(cache: ClusterCache, k: Array, v: Array) -> ClusterCache:
    length = cache.length + k.shape[1]
    return cache._replace(k=write(cache.k, k, cache.length), v=write(cache.v, v, cache.length), length=length)


def _cluster(cache: ClusterCache, size: int, count: int, clustering: Clustering) -> ClusterCache:
    """The next `size` tokens in `count` clusters more."""
    first = cache.clustered
    key = jax.random.fold_in(jax.random.key(clustering.seed), first)
    k, v = (jax.lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in (cache.k, cache.v))

    def of_head(key: Array, k: Float[Array, "n K"], v: Float[Array, "n V"]) -> tuple[Array, ...]:
        centers, labels = spherical_kmeans(k, count, key=key, iterations=clustering.iterations)
        of_values = means(v.astype(jnp.float32), labels, jnp.zeros((count, v.shape[-1]), jnp.float32))
        return centers, of_values, jnp.bincount(labels, length=count), first + jnp.argsort(labels, stable=True)

    keys = jax.random.split(key, (k.shape[0], k.shape[2]))
    found = jax.vmap(jax.vmap(of_head, in_axes=(0, 1, 1)))(keys, k, v)
    at_cluster = lambda old, new: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
        old, new.astype(old.dtype), cache.clusters, axis=2
    )
    return cache._replace(
        key_means=at_cluster(cache.key_means, found[0]),
        value_means=at_cluster(cache.value_means, found[1]),
        sizes=at_cluster(cache.sizes, found[2]),
        members=jax.lax.dynamic_update_slice_in_dim(
            cache.members, found[3].astype(jnp.int32), first - clustering.sink, axis=2
        ),
        clusters=cache.clusters + count,
        clustered=first + size,
    )


class Ranking(NamedTuple):
    """The clusters of every query head, most promising first."""

    cluster: Int[Array, "B H C"]
    size: Int[Array, "B H C"]  # 0 for a cluster that does not exist
    until: Int[Array, "B H C"]  # tokens in the clusters up to this one
    score: Float[Array, "B H C"]  # q . mean of the keys


def rank_clusters(q: Float[Array, "B 1 H K"], cache: ClusterCache) -> Ranking:
    """By the product of the query with the mean of the keys."""
    batch, _, heads, _ = q.shape
    groups = cache.k.shape[2]
    grouped = q[:, 0].reshape(batch, groups, heads // groups, -1).astype(jnp.float32)
    score = jnp.einsum("bgrk,bgck->bgrc", grouped, cache.key_means, precision="highest")
    sizes = jnp.broadcast_to(cache.sizes[:, :, None], score.shape)
    score = jnp.where(sizes > 0, score, -jnp.inf)
    score, cluster = jax.lax.top_k(score.reshape(batch, heads, -1), score.shape[-1])
    size = jnp.take_along_axis(sizes.reshape(batch, heads, -1), cluster, axis=-1)
    return Ranking(cluster, size, jnp.cumsum(size, axis=-1), score)


def first_members(ranking: Ranking, cache: ClusterCache, count: int) -> Int[Array, "B H n"]:
    """The first `count` tokens of the clusters in their ranking; -1 where there are no more."""
    batch, heads = ranking.cluster.shape[:2]
    groups = cache.k.shape[2]
    repeat = lambda x: jnp.repeat(x, heads // groups, axis=1)  # noqa: E731
    starts = repeat(jnp.cumsum(cache.sizes, axis=-1) - cache.sizes)
    place = jnp.arange(count)
    find = jax.vmap(jax.vmap(lambda until: jnp.searchsorted(until, place, side="right")))
    which = jnp.minimum(find(ranking.until), ranking.until.shape[-1] - 1)
    take = lambda x: jnp.take_along_axis(x, which, axis=-1)  # noqa: E731
    within = place - (take(ranking.until) - take(ranking.size))
    start = jnp.take_along_axis(starts, take(ranking.cluster), axis=-1)
    token = jnp.take_along_axis(
        repeat(cache.members), jnp.minimum(start + within, cache.members.shape[-1] - 1), axis=-1
    )
    return jnp.where(place < ranking.until[..., -1:], token, -1).reshape(batch, heads, count)
