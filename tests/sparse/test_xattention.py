"""XAttention: golden numbers, scores and choices against an oracle, thresholds. The rest is in `test_mechanisms`."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import query_chunks
from effattn_jax.sparse.xattention import block_scores, enough, search_thresholds, xattention, xattention_blocks
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.golden_inputs import DIGITS, SCALE, waves
from tests.sparse.inputs import qkv
from tests.sparse.records.minference import SIZE
from tests.sparse.records.xattention import blocks, values

STATIC = ("block_size", "stride", "scale")
score_of, select = (jit(f, static_argnames=STATIC) for f in (block_scores, xattention_blocks))


def sets(lists):
    return [set(row[row >= 0].tolist()) for row in np.asarray(lists)]


def test_table():
    with jax.enable_x64(True):
        q, k, _ = waves()
        options = {"block_size": 8, "stride": 4, "scale": SCALE}
        score, lists = score_of(q, k, **options), select(q, k, tau=0.6, **options)
    want = [(2, 0, 0, 0), (1.5367, 0.4633, 0, 0), (0.5768, 0.8770, 0.5462, 0), (0.4416, 0.6859, 0.7560, 0.1165)]
    np.testing.assert_allclose(score[0, 0], want, rtol=0, atol=6e-5)
    assert lists[0, :, 0].tolist() == [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1], [0, 2, 3, -1]]
    assert DIGITS < 6e-5  # this table has four digits


@pytest.mark.parametrize(("length", "keys", "stride"), [(37, 37, 4), (40, 40, 2), (11, 35, 4), (13, 13, 1)])
@pytest.mark.quick_cases(1)
def test_scores_and_lists(length, keys, stride):
    """Ragged ends, and queries after keys of other chunks."""
    q, k, _ = qkv(length, keys)
    options = {"block_size": SIZE, "stride": stride}
    score, lists = score_of(q, k, **options), select(q, k, tau=0.7, **options)
    for b, h in np.ndindex(2, 4):
        of_head = q[b, :, h].astype(np.float64), k[b, :, h // 2].astype(np.float64)
        assert_close(values(*of_head, stride), score[b, h], FLOAT32)
        assert sets(lists[b, :, h]) == list(blocks(*of_head, 0.7, stride))


def test_a_stride_of_one_is_the_mass_of_the_blocks():
    q, k, _ = qkv(24)
    score = score_of(q, k, block_size=8, stride=1)
    s = np.einsum("bthk,bmhk->bhtm", q, np.repeat(k, 2, 2)).astype(np.float64) / 4
    p = np.exp(np.where(np.tril(np.ones((24, 24), bool)), s, -np.inf))
    p /= p.sum(-1, keepdims=True)
    assert_close(p.reshape(2, 4, 3, 8, 3, 8).sum((3, 5)), score, FLOAT32)


@pytest.mark.slow
def test_chunks_of_a_prompt_choose_what_the_prompt_chooses():
    q, k, _ = qkv(48)
    options = {"block_size": 8, "stride": 4, "tau": 0.6}
    whole = np.asarray(select(q, k, **options))
    for start, end in ((0, 16), (16, 48)):
        part = select(q[:, start:end], k[:, :end], **options)
        assert [sets(x) for x in np.moveaxis(part, 2, 1).reshape(8, -1, end // 8)] == [
            sets(x) for x in np.moveaxis(whole[:, start // 8 : end // 8], 2, 1).reshape(8, -1, 6)
        ]


def test_chunks_of_queries_change_nothing(monkeypatch):
    q, k, _ = qkv(48)
    run = lambda q, k: block_scores(q, k, block_size=8, stride=4)  # noqa: E731
    want = jit(run)(q, k)
    monkeypatch.setattr(query_chunks, "IN_FLIGHT", 2 * 4 * 2 * 12 * 4)  # four blocks of queries
    assert_close(want, jit(lambda q, k: run(q, k))(q, k), 1e-6)


def test_more_mass_reads_more_blocks():
    """In each case the first block and the own one."""
    q, k, _ = qkv(64, batch=1)
    before = None
    for tau in (0.01, 0.5, 0.8, 0.95, 1.1):
        lists = np.asarray(select(q, k, tau=np.float32(tau), block_size=8, stride=4))
        now = [[sets(lists[0, :, h])[i] for i in range(8)] for h in range(4)]
        assert all({0, i} <= row[i] <= set(range(i + 1)) for row in now for i in range(8))
        if before is not None:
            assert all(a <= b for one, two in zip(before, now, strict=True) for a, b in zip(one, two, strict=True))
        else:
            assert all(row[i] == {0, i} for row in now for i in range(8))
        before = now
    assert all(row[i] == set(range(i + 1)) for row in now for i in range(8))


def test_thresholds_of_heads():
    q, k, _ = qkv(64, batch=1)
    tau = np.array([0.3, 0.9, 0.6, 1.2], np.float32)
    lists = np.asarray(select(q, k, tau=tau, block_size=8, stride=4))
    for h in range(4):
        alone = np.asarray(select(q, k, tau=tau[h], block_size=8, stride=4))
        np.testing.assert_array_equal(lists[:, :, h], alone[:, :, h])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_of_many_blocks(dtype):
    """10^4 blocks of equal value: the first ones, as many as it takes, though 16 bits could not count them."""
    count = 10_000
    score = jnp.full((1, 1, 1, count), 2.0**-13, dtype)
    taken = np.asarray(jit(enough)(score, np.array([count - 1]), np.float32(0.999)))[0, 0, 0]
    assert taken[: count - 11].all()
    assert taken.sum() == 9990  # the own block at the end is one of them


def test_search_of_thresholds_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(10):
        scores = rng.standard_normal((3, 4))
        for reductions in range(10):
            got = search_thresholds(scores, reductions, start=0.8, factor=0.5)
            ways = [r for r in itertools.product(range(4), repeat=3) if sum(r) == reductions]
            best = max(ways, key=lambda r: scores[np.arange(3), list(r)].sum())
            np.testing.assert_allclose(got, 0.8 * 0.5 ** np.array(best))


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("stride", lambda q, k, v: xattention(q, k, v, block_size=8, stride=3)),
        ("k", lambda q, k, v: xattention(q[:, 4:], k, v, block_size=8, stride=4)),
        ("k", lambda q, k, v: xattention(q, k[:, 8:], v[:, 8:], block_size=8, stride=4)),
        ("tau", lambda q, k, v: xattention(q, k, v, block_size=8, stride=4, tau=[0.9] * 3)),
        ("scale", lambda q, k, v: xattention(q, k, v, block_size=8, stride=4, scale=float("nan"))),
        ("reductions", lambda q, k, v: search_thresholds(np.zeros((2, 3)), 5)),
        ("scores", lambda q, k, v: search_thresholds(np.zeros(3), 1)),
    ],
)
def test_bad_arguments(argument, call):
    with pytest.raises(ValueError, match=rf"\b{argument}: got .+; needs .+"):
        call(*qkv(16))


@pytest.mark.slow
def test_memory_is_linear_in_length():
    """But for lists, blocks by blocks."""

    def size(length):
        q, k = (jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32) for _ in range(2))
        run = jit(partial(block_scores, block_size=128, stride=8))
        return run.lower(q, k).compile().memory_analysis().temp_size_in_bytes

    assert size(65536) < 4.5 * size(16384)
