"""Clusters of keys: their bookkeeping, and what a query reads of them, against loops in float64 numpy."""

from functools import partial
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention
from effattn_jax.sparse.cluster_cache import Clustering, append_clusters, init_cluster_cache, prefill_clusters
from effattn_jax.sparse.cluster_kv import cached_cluster_kv
from effattn_jax.sparse.kmeans import spherical_kmeans
from effattn_jax.sparse.retro import cached_retro
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.brute_force import brute_force
from tests.sparse.inputs import qkv, randn

SMALL = Clustering(sink=3, clusters=5, window=8, window_clusters=2, iterations=5)
PROMPT, LENGTH, CAPACITY = 40, 52, 64
prefill = jit(prefill_clusters, static_argnames="clustering")
append = jit(append_clusters, static_argnames="clustering")
read_clusters = jit(cached_cluster_kv, static_argnames=("clustering", "budget", "scale"))
read_zones = jit(cached_retro, static_argnames=("clustering", "retrieval", "estimation", "scale"))


def filled(k, v, clustering=SMALL, prompt=PROMPT):
    cache = init_cluster_cache(2, CAPACITY, 2, k.shape[3], v.shape[3], clustering=clustering, dtype=jnp.float32)
    return prefill(cache, k[:, :prompt], v[:, :prompt], clustering=clustering)


def clusters_of(cache, row, group):
    """Token lists by cluster, as the arrays say."""
    ends = np.cumsum(cache.sizes[row, group])
    return [
        list(np.asarray(cache.members[row, group, e - s : e]))
        for s, e in zip(cache.sizes[row, group], ends, strict=True)
    ]


@pytest.mark.slow
def test_k_means():
    x = randn(0, (50, 6))[0]
    centers, labels = (np.asarray(y) for y in spherical_kmeans(x, 7, key=jax.random.key(0)))
    assert len(set(labels)) > 1
    for c in set(labels):
        np.testing.assert_allclose(centers[c], x[labels == c].mean(0), rtol=1e-4, atol=1e-6)
    few, labels = spherical_kmeans(x[:3], 5, key=jax.random.key(0))  # more centers than vectors
    assert np.isfinite(few).all()
    assert sorted(set(np.asarray(labels))) == [0, 1, 2]
    alike = np.repeat(np.eye(6, dtype=np.float32), 4, 0) * np.arange(1, 25, dtype=np.float32)[:, None]
    _, labels = spherical_kmeans(alike, 24, key=jax.random.key(0))
    assert all(len(set(np.asarray(labels)[4 * i : 4 * i + 4])) == 1 for i in range(6))


@pytest.mark.slow
def test_every_token_is_in_one_cluster():
    _, k, v = qkv(LENGTH)
    cache = filled(k, v)
    cache = append(cache, k[:, PROMPT:], v[:, PROMPT:], clustering=SMALL)
    assert int(cache.clustered) == PROMPT + 8
    assert int(cache.clusters) == 5 + 2
    for row, group in np.ndindex(2, 2):
        lists = clusters_of(cache, row, group)
        assert sorted(chain.from_iterable(lists)) == list(range(3, PROMPT + 8))
        assert all(set(x) <= set(range(PROMPT, PROMPT + 8)) for x in lists[5:7])  # the new ones by themselves
        for c, tokens in enumerate(lists):
            for means, x in ((cache.key_means, k), (cache.value_means, v)):
                want = x[row, tokens, group].mean(0) if tokens else 0
                if tokens:
                    np.testing.assert_allclose(means[row, group, c], want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_any_split_of_new_tokens_is_the_same_cache():
    _, k, v = qkv(LENGTH)
    whole = append(filled(k, v), k[:, PROMPT:], v[:, PROMPT:], clustering=SMALL)
    parts = filled(k, v)
    for token in range(PROMPT, LENGTH, 4):
        parts = append(parts, k[:, token : token + 4], v[:, token : token + 4], clustering=SMALL)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def expected(q, k, v, cache, budget, sink=3):
    mask = np.zeros((2, 4, 1, LENGTH), bool)
    for row, head in np.ndindex(2, 4):
        lists = clusters_of(cache, row, head // 2)
        score = {c: q[row, 0, head] @ k[row, x, head // 2].astype(np.float64).mean(0) for c, x in enumerate(lists) if x}
        ranked = list(chain.from_iterable(lists[c] for c in sorted(score, key=score.get, reverse=True)))
        mask[row, head, 0, ranked[: budget - sink]] = True
        mask[row, head, 0, :sink] = mask[row, head, 0, int(cache.clustered) :] = True
    return mask


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("budget", [9, 20, 1000])
def test_reads_the_best_clusters_up_to_the_budget(budget):
    q, k, v = qkv(1, LENGTH)
    last = LENGTH - 1
    cache = append(filled(k, v), k[:, PROMPT:last], v[:, PROMPT:last], clustering=SMALL)
    out, after = read_clusters(q, k[:, last:], v[:, last:], cache, clustering=SMALL, budget=budget)
    assert int(after.length) == LENGTH
    mask = expected(q, k, v, after, budget)
    members = min(budget - 3, PROMPT + 8 - 3)
    assert (mask.sum(-1) == members + 3 + LENGTH - PROMPT - 8).all()
    assert_close(brute_force(mask, q, k, v)[0], out, FLOAT32)
    if budget == 1000:
        assert_close(attention(q, k, v), out, FLOAT32)


@pytest.mark.slow
def test_like_keys_are_read_together():
    q, k, v = qkv(1, LENGTH)
    planted = [5, 17, 29, 36]
    for row, group in np.ndindex(2, 2):
        k[row, planted, group] = 20 * q[row, 0, 2 * group] + 0.01 * k[row, planted, group]
    v = np.broadcast_to(np.eye(LENGTH, dtype=np.float32)[None, :, None], (2, LENGTH, 2, LENGTH))
    clustering = SMALL._replace(clusters=12, iterations=20)
    cache = append(filled(k, v, clustering), k[:, PROMPT:-1], v[:, PROMPT:-1], clustering=clustering)
    weights, _ = read_clusters(q, k[:, -1:], v[:, -1:], cache, clustering=clustering, budget=24)
    assert (np.asarray(weights)[:, 0, ::2, planted] > 0.1).all()


@pytest.mark.slow
def test_zones_that_hold_everything_are_dense_attention():
    q, k, v = qkv(1, LENGTH)
    cache = append(filled(k, v), k[:, PROMPT:-1], v[:, PROMPT:-1], clustering=SMALL)
    out, _ = read_zones(q, k[:, -1:], v[:, -1:], cache, clustering=SMALL, retrieval=1.0, estimation=0.0)
    assert_close(attention(q, k, v), out, FLOAT32)


@pytest.mark.slow
def test_estimates_are_exact_where_keys_are_alike():
    q, k, v = qkv(1, LENGTH)
    rng = np.random.default_rng(3)
    k[:, 3:PROMPT] = k[:, rng.integers(0, 5, PROMPT - 3)]  # five different keys
    clustering = SMALL._replace(clusters=30, window=100, iterations=20)
    cache = append(filled(k, v, clustering), k[:, PROMPT:-1], v[:, PROMPT:-1], clustering=clustering)
    for row, group in np.ndindex(2, 2):
        for tokens in filter(None, clusters_of(cache, row, group)):
            assert np.ptp(k[row, tokens, group], axis=0).max() == 0
    run = partial(read_zones, q, k[:, -1:], v[:, -1:], cache, clustering=clustering)
    assert_close(attention(q, k, v), run(retrieval=0.1, estimation=0.9)[0], FLOAT32)
    assert_close(attention(q, k, v), run(retrieval=0.0, estimation=1.0)[0], FLOAT32)


@pytest.mark.slow
def test_the_rest_is_left_out():
    """Zones by brute force: read, estimated, dropped."""
    q, k, v = qkv(1, LENGTH)
    cache = append(filled(k, v), k[:, PROMPT:-1], v[:, PROMPT:-1], clustering=SMALL)
    out, after = read_zones(q, k[:, -1:], v[:, -1:], cache, clustering=SMALL, retrieval=0.2, estimation=0.3)
    kinds = set()
    want = np.zeros((2, 1, 4, v.shape[3]))
    for row, head in np.ndindex(2, 4):
        mean = lambda x, tokens: x[row, tokens, head // 2].astype(np.float64).mean(0)  # noqa: B023, E731
        product = lambda x: q[row, 0, head].astype(np.float64) @ x / 4  # noqa: B023, E731
        lists = [x for x in clusters_of(after, row, head // 2) if x]
        lists.sort(key=lambda x: -product(mean(k, x)))
        until, total, summed = 0, 0.0, np.zeros(v.shape[3])
        for tokens in [[j] for j in (*range(3), *range(int(after.clustered), LENGTH))]:
            total += np.exp(product(mean(k, tokens)))
            summed += np.exp(product(mean(k, tokens))) * mean(v, tokens)
        for tokens in lists:
            until += len(tokens)
            kind = (
                "read" if until <= round(0.2 * CAPACITY) else "estimated" if until <= round(0.5 * CAPACITY) else "out"
            )
            kinds.add(kind)
            for part in {"read": [[j] for j in tokens], "estimated": [tokens], "out": []}[kind]:
                weight = len(part) * np.exp(product(mean(k, part)))
                total, summed = total + weight, summed + weight * mean(v, part)
        want[row, 0, head] = summed / total
    assert kinds == {"read", "estimated", "out"}
    assert_close(want, out, FLOAT32)


def test_bad_arguments():
    q, k, v = qkv(2)
    cache = init_cluster_cache(2, 16, 2, 16, clustering=SMALL, dtype=jnp.float32)
    for argument, run in {
        "q": lambda: cached_cluster_kv(q, k, v, cache, clustering=SMALL),
        "budget": lambda: cached_cluster_kv(q[:, :1], k[:, :1], v[:, :1], cache, clustering=SMALL, budget=3),
        "k": lambda: cached_cluster_kv(q[:, :1], k[..., :7], v, cache, clustering=SMALL),
        "retrieval": lambda: cached_retro(q[:, :1], k[:, :1], v[:, :1], cache, clustering=SMALL, retrieval=1.5),
        "clusters": lambda: init_cluster_cache(2, 16, 2, 16, clustering=SMALL._replace(clusters=0)),
        "cache": lambda: prefill_clusters(cache._replace(length=jnp.array(1)), k, v, clustering=SMALL),
    }.items():
        with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+"):
            run()
