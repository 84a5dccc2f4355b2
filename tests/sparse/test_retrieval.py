"""Retrieved keys, against all products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention, cached_attention, init_cache
from effattn_jax.sparse.key_index import ExactIndex, FaissIndex
from effattn_jax.sparse.retrieval import KeyIndices, retrieval_attention
from tests.ratio import FLOAT32, assert_close
from tests.sparse.brute_force import brute_force
from tests.sparse.inputs import qkv

LENGTH, INITIAL, RECENT = 60, 4, 6


def filled(length=LENGTH, index=ExactIndex):
    q, k, v = qkv(LENGTH)
    cache = init_cache(2, 64, 2, 16, dtype=jnp.float32)
    _, cache = cached_attention(q[:, :length], k[:, :length], v[:, :length], cache)
    indices = KeyIndices(2, 2, 16, initial=INITIAL, recent=RECENT, index=index)
    indices.update(cache)
    return (q, k, v), cache, indices


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("topk", [5, 100])
def test_reads_the_first_the_newest_and_the_best(topk):
    (q, k, v), cache, indices = filled()
    out = jax.jit(lambda q, cache: retrieval_attention(q, cache, indices, topk=topk))(q[:, -1:], cache)
    mask = np.zeros((2, 4, 1, LENGTH), bool)
    for row, head in np.ndindex(2, 4):
        products = k[row, :, head // 2].astype(np.float64) @ q[row, -1, head]
        old = np.arange(INITIAL, LENGTH - RECENT)
        mask[row, head, 0, old[np.argsort(-products[old], kind="stable")][:topk]] = True
        mask[row, head, 0, :INITIAL] = mask[row, head, 0, LENGTH - RECENT :] = True
    assert_close(brute_force(mask, q[:, -1:], k, v)[0], out, FLOAT32)
    if topk == 100:
        assert_close(attention(q[:, -1:], k, v), out, FLOAT32)


@pytest.mark.slow
def test_nothing_is_lost_between_updates():
    """Tokens that left the recent ones after the last update are read still."""
    (q, k, v), cache, indices = filled(LENGTH - 5)
    _, cache = cached_attention(q[:, -5:], k[:, -5:], v[:, -5:], cache)
    out = retrieval_attention(q[:, -1:], cache, indices, topk=100)
    assert_close(attention(q[:, -1:], k, v), out, FLOAT32)
    indices.update(cache)
    assert indices.until == LENGTH - RECENT
    assert_close(out, retrieval_attention(q[:, -1:], cache, indices, topk=100), FLOAT32)


@pytest.mark.slow
def test_an_update_that_is_overdue_is_an_error():
    (q, k, v), cache, indices = filled(LENGTH - 7)
    _, cache = cached_attention(q[:, -7:], k[:, -7:], v[:, -7:], cache)
    with pytest.raises(ValueError, match=r"indices: got 13 tokens that are not indexed; needs update\(\) at 12"):
        retrieval_attention(q[:, -1:], cache, indices, topk=5)


@pytest.mark.slow
def test_a_short_row_has_nothing_to_find():
    (q, k, v), cache, indices = filled(3)
    out = retrieval_attention(q[:, 2:3], cache, indices, topk=2)
    assert_close(attention(q[:, 2:3], k[:, :3], v[:, :3]), out, FLOAT32)


def test_a_graph_of_keys_finds_most_of_what_is_best():
    """Queries from elsewhere than the keys, as attention has them."""
    rng = np.random.default_rng(0)
    keys = (rng.standard_normal((2000, 32)) + 1).astype(np.float32)
    queries = (rng.standard_normal((50, 32)) - 0.5).astype(np.float32)
    exact, graph = ExactIndex(32), FaissIndex(32)
    for index in (exact, graph):
        index.add(keys[:1500])
        index.add(keys[1500:])
    want, got = (index.search(queries, 20) for index in (exact, graph))
    recall = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(want, got, strict=True)])
    assert recall > 0.9
    assert (FaissIndex(32).search(queries, 3) == -1).all()


def test_bad_arguments():
    (q, _, _), cache, indices = filled(3)
    for argument, run in {
        "q": lambda: retrieval_attention(q[:, :2], cache, indices),
        "topk": lambda: retrieval_attention(q[:, :1], cache, indices, topk=0),
        "indices": lambda: retrieval_attention(q[:, :1], cache, KeyIndices(1, 2, 16)),
        "recent": lambda: KeyIndices(1, 2, 16, recent=0),
        "factory": lambda: FaissIndex(16, "IVF4,Flat"),
    }.items():
        with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+"):
            run()
