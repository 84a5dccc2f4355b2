"""FlexPrefill: golden numbers, and the blocks of every head against an oracle. The rest is in `test_mechanisms`."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention
from effattn_jax.sparse.block_masks import block_means
from effattn_jax.sparse.flexprefill import (
    block_sums,
    blocks_of,
    distance,
    flexprefill,
    flexprefill_blocks,
    last_marginals,
    mean_weights,
)
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.golden_inputs import DIGITS, SCALE, waves
from tests.sparse.inputs import qkv
from tests.sparse.records.flexprefill import OPTIONS, RECORDS, blocks, by_means
from tests.sparse.records.minference import SIZE
from tests.sparse.test_mechanisms import draw

STATIC = ("block_size", "gamma", "tau", "min_budget", "max_budget")
select = partial(jit(flexprefill_blocks, static_argnames=STATIC), block_size=SIZE)


@partial(jit, static_argnames=("size", "scale"))
def statistics(q, k, size, scale=None):
    """Marginals, the weights of block means, and their distance."""
    marginals = last_marginals(q, k, size, scale)
    a = mean_weights(q, block_means(k, size), size, scale)
    return marginals, a, distance(a, marginals.column, size)


def sets(lists):
    return [set(row[row >= 0].tolist()) for row in lists]


def test_table():
    with jax.enable_x64(True):
        q, k, _ = waves()
        marginals, a, far = statistics(q, k, 8, SCALE)
        v = block_sums(marginals.column, 8)
        count = int(jit(lambda x: blocks_of(x, 0.9, 1))(marginals.column)[0, 0])
    np.testing.assert_allclose(a[0, 0], (0.236275, 0.297349, 0.199115, 0.267261), rtol=0, atol=DIGITS)
    np.testing.assert_allclose(v[0, 0], (0.284621, 0.281872, 0.280417, 0.153091), rtol=0, atol=DIGITS)
    np.testing.assert_allclose(far[0, 0], 0.111983, rtol=0, atol=DIGITS)
    assert count == 23 + 2  # blocks of one token: one for each that is counted, and two more


def kinds(q, k, tau):
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    return {bool(by_means(q[b, :, h], k[b, :, h // 2], tau)) for b, h in np.ndindex(2, 4)}


def test_the_record_has_heads_of_both_kinds():
    q, k, _ = draw(RECORDS[0], 37, seed=37)
    assert kinds(q, k, OPTIONS["tau"]) == {True, False}


@pytest.mark.parametrize(
    ("length", "keys", "options"),
    [
        (40, 40, OPTIONS | {"tau": 0.14}),
        (21, 61, OPTIONS | {"min_budget": 2 * SIZE}),
        (59, 59, {"gamma": 0.95, "tau": 0.0, "min_budget": SIZE, "max_budget": 2 * SIZE}),
    ],
)
@pytest.mark.quick_cases(2)
def test_lists(length, keys, options):
    q, k, _ = qkv(length, keys)
    lists = np.asarray(select(q, k, **options))
    assert kinds(q, k, options["tau"]) == ({True, False} if options["tau"] else {False})
    for b, h in np.ndindex(2, 4):
        want = blocks(q[b, :, h].astype(np.float64), k[b, :, h // 2].astype(np.float64), **options)
        assert sets(lists[b, :, h]) == want


def test_the_first_column_and_the_diagonal_are_always_read():
    q, k, _ = qkv(48)
    lists = select(q, k, gamma=0.01, tau=0.0, min_budget=1)
    for b, h in np.ndindex(2, 4):
        assert sets(np.asarray(lists)[b, :, h]) == [{0, i} for i in range(6)]


@pytest.mark.slow  # the record has it without means
def test_everything_of_the_past():
    q, k, _ = qkv(45)
    for tau in (0.0, 10.0):
        lists = np.asarray(select(q, k, gamma=1.001, tau=tau, min_budget=1))
        assert sets(lists[0, :, 0]) == [set(range(i + 1)) for i in range(6)]


def test_like_weights_are_at_no_distance():
    q, k, _ = qkv(40)
    far = statistics(np.zeros_like(q), k, SIZE)[2]
    # 32 tokens that all of the last 8 queries read, and 8 that they read in part
    row = np.array([sum(1 / n for n in range(33, 41)) / 8] * 4)
    last = 1 - 8 * row.sum()
    a, v = np.full(5, 0.2), np.array([*(8 * row), last])
    m = (a + v) / 2
    want = np.sqrt(((a * np.log(a / m)).sum() + (v * np.log(v / m)).sum()) / 2)
    np.testing.assert_allclose(far, want, rtol=1e-4)
    assert want < 0.1


def test_a_weight_of_zero_is_no_number():
    """As if 0 ln 0 were none: such a head keeps to its columns and diagonals."""
    v = np.full((1, 1, 16), 1 / 16, np.float32)
    far = jit(lambda a, v: distance(a, v, 8))
    assert jnp.isinf(far(jnp.array([[[1.0, 0.0]]]), v))[0, 0]
    assert jnp.isinf(far(jnp.array([[[0.5, 0.5]]]), np.where(np.arange(16) < 8, 1 / 8, np.float32(0))[None, None]))[
        0, 0
    ]
    assert far(jnp.array([[[0.5, 0.5]]]), v)[0, 0] == 0


def test_planted_columns_and_diagonals():
    """The second head reads key 19, in block 2; the third, 24 tokens back."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 64, 2, 16)).astype(np.float32) for _ in range(2))
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    k *= 0.1
    k[:, 19, 0] = 60 * q[:, 56:, 0].mean(1)
    k[:, :40, 1] = 40 * q[:, 24:, 1]
    lists = np.asarray(select(q, k, gamma=0.3, tau=0.0, min_budget=2 * SIZE))
    assert all({0, 2, i} <= chosen for i, chosen in enumerate(sets(lists[0, :, 0])) if i >= 2)
    assert all({i - 3, i} <= chosen for i, chosen in enumerate(sets(lists[0, :, 1])) if i >= 3)


def test_short_rows_are_dense(monkeypatch):
    module = importlib.import_module("effattn_jax.sparse.flexprefill")  # the package has its function by this name
    monkeypatch.setattr(module, "flexprefill_blocks", None)  # is not called
    q, k, v = qkv(32)
    for options in ({"min_budget": 25}, {"min_budget": 32}):
        assert_close(attention(q, k, v), flexprefill(q, k, v, block_size=8, **options), FLOAT32)
    assert_close(attention(q, k, v), flexprefill(q, k, v, block_size=16, min_budget=1), FLOAT32)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("gamma", {"gamma": float("nan")}),
        ("tau", {"tau": -1.0}),
        ("min_budget", {"min_budget": 0}),
        ("block_size", {"block_size": 0}),
        ("k", {"keys": 43}),
        ("k", {"keys": 20}),
    ],
)
def test_bad_arguments(argument, options):
    q, k, v = qkv(40, options.pop("keys", 40))
    with pytest.raises(ValueError, match=rf"\b{argument}: got .+; needs .+"):
        flexprefill(q, k, v, **{"block_size": 8, "min_budget": 8} | options)
