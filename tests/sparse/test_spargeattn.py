"""SpargeAttn: the blocks of every head against an oracle. The rest is in `test_mechanisms`."""

from functools import partial

import numpy as np
import pytest

from effattn_jax.sparse.spargeattn import self_similarity, spargeattn, spargeattn_blocks
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.inputs import qkv
from tests.sparse.records.spargeattn import KEYS, QUERIES, alike, blocks

STATIC = ("query_block", "block_size", "topk", "mass", "similarity")
select = partial(jit(spargeattn_blocks, static_argnames=STATIC), query_block=QUERIES, block_size=KEYS)


def sets(lists):
    return [set(row[row >= 0].tolist()) for row in np.asarray(lists)]


def assert_chosen(q, k, **options):
    lists = select(q, k, **options)
    some = set()
    for b, h in np.ndindex(2, 4):
        want = list(blocks(q[b, :, h].astype(np.float64), k[b, :, h // 2].astype(np.float64), **options))
        assert sets(lists[b, :, h]) == want
        some |= {len(x) for x in want}
    assert len(some) > 2  # lists of several lengths


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("length", "keys"), [(37, 37), (40, 40), (13, 29)])
def test_as_many_blocks(length, keys):
    q, k, _ = qkv(length, keys, key_dim=8)
    assert_chosen(q, k, topk=0.3, similarity=0.2)


@pytest.mark.parametrize(("length", "mass"), [(37, 0.5), (40, 0.9)])
@pytest.mark.quick_cases(1)
def test_as_much_mass(length, mass):
    q, k, _ = qkv(length, key_dim=8)
    assert_chosen(q, k, topk=None, mass=mass, similarity=0.2)


def test_without_likeness_only_the_choice_counts():
    q, k, _ = qkv(40, key_dim=8)
    assert_chosen(q, k, topk=0.2, similarity=-1.0)


def test_everything_is_read_where_nothing_is_alike():
    q, k, _ = qkv(37)
    lists = select(q, k, topk=0.1, similarity=1.1)
    for b, h in np.ndindex(2, 4):
        assert sets(lists[b, :, h]) == [set(range(min(2 * i + 2, 10))) for i in range(5)]


def test_a_key_that_all_have_in_common_changes_nothing():
    q, k, _ = qkv(40)
    options = {"topk": 0.3, "similarity": 0.3}
    np.testing.assert_array_equal(select(q, k, **options), select(q, k + 3 * k[:, :1], **options))


def test_similarity():
    q, _, _ = qkv(21)
    got = np.asarray(jit(partial(self_similarity, block_size=8))(q))
    want = [[[alike(q[b, i : i + 8, h]) for h in range(4)] for i in (0, 8, 16)] for b in range(2)]
    assert_close(np.array(want), got, FLOAT32)
    same = np.broadcast_to(q[:, :1], q.shape)
    np.testing.assert_allclose(self_similarity(same, 8), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("topk", {"topk": None}),
        ("topk", {"mass": 0.5}),
        ("topk", {"topk": 0.0}),
        ("mass", {"topk": None, "mass": -1.0}),
        ("block_size", {"block_size": 0}),
        ("k", {"keys": 43}),
        ("scale", {"scale": float("inf")}),
    ],
)
def test_bad_arguments(argument, options):
    q, k, v = qkv(40, options.pop("keys", 40))
    with pytest.raises(ValueError, match=rf"\b{argument}: got .+; needs .+"):
        spargeattn(q, k, v, **{"query_block": 8, "block_size": 4} | options)
