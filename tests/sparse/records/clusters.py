"""ClusterKV and RetroInfer after a prompt of 20 tokens.

Clusters begin at random keys, so that there is no oracle of what is read: `test_cluster_kv` reads it from the cache.
"""

from functools import partial

from effattn_jax.sparse import attention
from effattn_jax.sparse.cluster_cache import Clustering, init_cluster_cache, prefill_clusters
from effattn_jax.sparse.cluster_kv import cached_cluster_kv
from effattn_jax.sparse.retro import cached_retro
from tests.sparse.mechanism import Mechanism
from tests.sparse.token_by_token import after_a_prompt

PROMPT, BUDGET = 20, 12
CLUSTERING = Clustering(sink=3, clusters=5, window=8, window_clusters=2, iterations=5)


def _run(q, k, v, step, **options):
    def prefill(q, k, v, room):
        sizes = (k.shape[0], k.shape[1] + room, *k.shape[2:], v.shape[3])
        cache = init_cluster_cache(*sizes, clustering=CLUSTERING, dtype=k.dtype)
        return attention(q, k, v), prefill_clusters(cache, k, v, clustering=CLUSTERING)

    return after_a_prompt(prefill, partial(step, clustering=CLUSTERING, **options), PROMPT, q, k, v)


def count(length):
    """Sinks, members of clusters, and what is in none."""
    if length <= PROMPT:
        return length
    clustered = PROMPT + (length - PROMPT) // CLUSTERING.window * CLUSTERING.window
    return min(BUDGET, clustered) + length - clustered


FIELDS = {
    "lengths": (1, 20, 21, 28, 37),
    "shared": False,  # every key head begins its clusters at keys of its own
    "trainable": False,
    "packed": False,
    "continues": False,
    "slow": True,
}

RECORDS = [
    Mechanism(
        "cluster kv",
        partial(_run, step=cached_cluster_kv, budget=BUDGET),
        dense=partial(_run, step=cached_cluster_kv, budget=1000),
        count=count,
        **FIELDS,
    ),
    Mechanism(
        "retro",
        partial(_run, step=cached_retro, retrieval=0.2, estimation=0.3),
        dense=partial(_run, step=cached_retro, retrieval=1.0, estimation=0.0),
        **FIELDS,
    ),
]
