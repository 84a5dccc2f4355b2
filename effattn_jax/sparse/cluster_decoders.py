"""Decoders over all tokens, in clusters of like keys."""

from dataclasses import dataclass

from effattn_jax.sparse.cluster_cache import ClusterCache, Clustering, init_cluster_cache, prefill_clusters
from effattn_jax.sparse.cluster_kv import cached_cluster_kv
from effattn_jax.sparse.decoder import Decoder, Out
from effattn_jax.sparse.retro import CLUSTERING, cached_retro
from effattn_jax.typing import Array


@dataclass(frozen=True)
class ClusterKV(Decoder):
    """`cached_cluster_kv`."""

    budget: int = 1024
    clustering: Clustering = Clustering()  # noqa: RUF009

    def begin(self, q: Array, k: Array, v: Array, max_length: int, scale: float | None) -> ClusterCache:
        return _clusters(k, v, max_length, self.clustering)

    def step(self, q: Array, k: Array, v: Array, cache: ClusterCache, scale: float | None) -> tuple[Out, ClusterCache]:
        return cached_cluster_kv(q, k, v, cache, clustering=self.clustering, budget=self.budget, scale=scale)


@dataclass(frozen=True)
class Retro(Decoder):
    """`cached_retro`; shares are of the state's `max_length`."""

    retrieval: float = 0.018
    estimation: float = 0.232
    clustering: Clustering = CLUSTERING

    def begin(self, q: Array, k: Array, v: Array, max_length: int, scale: float | None) -> ClusterCache:
        return _clusters(k, v, max_length, self.clustering)

    def step(self, q: Array, k: Array, v: Array, cache: ClusterCache, scale: float | None) -> tuple[Out, ClusterCache]:
        return cached_retro(
            q,
            k,
            v,
            cache,
            clustering=self.clustering,
            retrieval=self.retrieval,
            estimation=self.estimation,
            scale=scale,
        )


def _clusters(k: Array, v: Array, max_length: int, clustering: Clustering) -> ClusterCache:
    sizes = (k.shape[0], max_length, *k.shape[2:], v.shape[3])
    cache = init_cluster_cache(*sizes, clustering=clustering, dtype=k.dtype)
    return prefill_clusters(cache, k, v, clustering=clustering)
