"""Mixture of block attention: golden numbers, and what is its own. The rest is in `test_mechanisms`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import query_chunks
from effattn_jax.sparse.moba import moba, moba_blocks
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.brute_force import brute_force
from tests.sparse.golden_inputs import DIGITS, SCALE, waves
from tests.sparse.inputs import qkv, randn
from tests.sparse.records.moba import blocks, mask_of

GOLDEN = {  # head: sets of rows, output of row 31, sum
    0: (
        {16: {0, 2}, 24: {2, 3}, 27: {1, 3}, 31: {2, 3}},
        (-0.086434, 0.195073, 0.445783, 0.626113),
        32.705408,
    ),
    1: (
        {16: {0, 2}, 24: {0, 3}, 27: {1, 3}, 31: {2, 3}},
        (-0.268786, -0.131060, 0.027358, 0.181456),
        39.407862,
    ),
}


def test_table():
    sizes = {"block_size": 8, "topk": 2}
    with jax.enable_x64(True):
        q, k, v = waves(0, 1)
        lists = np.asarray(jit(partial(moba_blocks, **sizes))(q, k))
        out = np.asarray(jit(partial(moba, scale=SCALE, **sizes))(q, k, v))
    for head, (sets, last, total) in GOLDEN.items():
        for t, chosen in sets.items():
            assert set(lists[0, t, head].tolist()) == chosen
        np.testing.assert_allclose(out[0, 31, head], last, rtol=0, atol=DIGITS)
        np.testing.assert_allclose(out[0, :, head].sum(), total, rtol=0, atol=DIGITS)


def test_lists_begin_with_the_own_block_and_hold_what_there_is():
    q, k, _ = qkv(37)
    lists = np.asarray(jit(partial(moba_blocks, block_size=8, topk=4))(q, k))
    want = blocks(q.astype(np.float64), k.astype(np.float64), 8, 4)
    for (b, h, t), chosen in want.items():
        assert lists[b, t, h].tolist() == chosen + [-1] * (4 - len(chosen))


def test_of_equal_gates_the_earlier_block():
    q, k, _ = qkv(40)
    lists = jit(partial(moba_blocks, block_size=8, topk=3))(-np.zeros_like(q), k)
    np.testing.assert_array_equal(lists[:, -1], np.broadcast_to([4, 0, 1], (2, 4, 3)))


def test_a_router_that_has_collapsed():
    """All queries want block 2: it meets many, other blocks none but their own."""
    q, k, v = qkv(64)
    q, k = np.abs(q), np.abs(k) * 0.1
    k[:, 16:24] += 1
    (do,) = randn(1, q.shape)
    want = brute_force(mask_of(blocks(q, k, 8, 2), q, k, 8), q, k, v, do)
    loss = lambda q, k, v: (moba(q, k, v, block_size=8, topk=2) * do).sum()  # noqa: E731
    assert_close(want[1], jit(jax.grad(loss, (0, 1, 2)))(q, k, v), FLOAT32)


def test_chunks_of_queries_change_nothing(monkeypatch):
    q, k, _ = qkv(50)
    run = lambda q, k: moba_blocks(q, k, block_size=8, topk=3)  # noqa: E731
    want = jit(run)(q, k)
    monkeypatch.setattr(query_chunks, "IN_FLIGHT", 2 * 4 * 6 * 7)  # seven queries
    np.testing.assert_array_equal(want, jit(lambda q, k: run(q, k))(q, k))


def test_recall_of_a_planted_key():
    """The mean of a block of 32 shows a 32nd of a key: at 10 that is 14 deviations of the noise, at 0 nothing."""
    trials, size, count, dim = 64, 32, 16, 64
    rng = np.random.default_rng(0)
    q = rng.standard_normal((trials, 1, 1, dim))
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    noise = rng.standard_normal((trials, count * size, 1, dim)) / np.sqrt(dim)
    place = rng.integers(0, (count - 1) * size, trials)
    run = jit(partial(moba_blocks, block_size=size, topk=2))

    def recall(strength):
        k = noise.copy()
        k[np.arange(trials), place] += strength * q[:, 0]
        lists = np.asarray(run(q.astype(np.float32), k.astype(np.float32)))[:, 0, 0]
        return np.mean(lists[:, 1] == place // size)

    assert recall(10) == 1
    assert recall(0) < 0.2  # one in 15 by chance
    assert recall(0) <= recall(1) <= recall(3)


@pytest.mark.slow
def test_memory_is_linear_in_length():
    def size(length):
        q, k, v = (jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32) for _ in range(3))
        loss = lambda q, k, v: moba(q, k, v, block_size=64, topk=3).sum()  # noqa: E731
        return jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert size(32768) < 4.5 * size(8192)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("topk", {"topk": 0}),
        ("block_size", {"block_size": 2.0}),
        ("k", {"k": np.zeros((2, 5, 2, 16), np.float32), "v": np.zeros((2, 5, 2, 16), np.float32)}),
        ("segment_ids", {"segment_ids": np.zeros((2, 7), np.int32)}),
        ("scale", {"scale": float("nan")}),
    ],
)
def test_bad_arguments(argument, change):
    q, k, v = qkv(8)
    with pytest.raises(ValueError, match=rf"\b{argument}: got .+; needs .+"):
        moba(**({"q": q, "k": k, "v": v, "block_size": 4, "topk": 2} | change))
