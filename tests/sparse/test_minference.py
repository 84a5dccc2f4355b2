"""MInference: golden numbers, what its tiles and columns cover, and the search. The rest is in `test_mechanisms`."""

from functools import partial

import jax
import numpy as np
import pytest

from effattn_jax.sparse.minference import (
    AShape,
    BlockTopK,
    minference,
    search_patterns,
    top_mean_blocks,
)
from effattn_jax.sparse.vertical_slash import VerticalSlash, vertical_slash_estimate, vertical_slash_lists
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.brute_force import brute_force
from tests.sparse.golden_inputs import SCALE, waves
from tests.sparse.inputs import qkv
from tests.sparse.records.minference import SLASHES, lines, slash_mask, top_mask

estimate = jit(vertical_slash_estimate, static_argnums=2, static_argnames=("scale",))
lists_of = jit(vertical_slash_lists, static_argnums=(2, 3, 4))
top_blocks = jit(top_mean_blocks, static_argnames=("topk", "block_size"))


def test_table():
    pattern = VerticalSlash(5, 5, 8, forced_columns=2, forced_diagonals=2, least_vertical=1, least_slash=1)
    with jax.enable_x64(True):
        q, k, _ = waves()
        columns, diagonals = estimate(q, k, pattern, scale=SCALE)
    assert sorted(columns[0, 0].tolist()) == [0, 1, 11, 12, 24]
    assert sorted(diagonals[0, 0].tolist()) == [0, 1, 6, 7, 19]


def test_estimate_of_the_last_queries():
    q, k, _ = qkv(11, 26)
    columns, diagonals = (np.asarray(x) for x in estimate(q, k, SLASHES))
    for b, h in np.ndindex(2, 4):
        want = lines(q[b, :, h].astype(np.float64), k[b, :, h // 2].astype(np.float64))
        assert (columns[b, h].tolist(), diagonals[b, h].tolist()) == want


def test_defaults_force_the_first_columns_and_the_nearest_diagonals():
    q, k, _ = qkv(150, batch=1)
    columns, diagonals = estimate(q, k, VerticalSlash(1, 1))
    np.testing.assert_array_equal(columns, np.broadcast_to(np.arange(30), (1, 4, 30)))
    np.testing.assert_array_equal(diagonals, np.broadcast_to(np.arange(50), (1, 4, 50)))
    columns, diagonals = (np.sort(x) for x in estimate(q, k, VerticalSlash(40, 120)))
    np.testing.assert_array_equal(columns[..., :30], np.broadcast_to(np.arange(30), (1, 4, 30)))
    np.testing.assert_array_equal(diagonals[..., :100], np.broadcast_to(np.arange(100), (1, 4, 100)))


def test_finds_a_planted_diagonal():
    """k_{t - 13} = 4 q_t where q_t is another direction for every t."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 60, 1, 32)).astype(np.float32)
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    k = np.zeros_like(q)
    k[:, :47] = 40 * q[:, 13:]
    pattern = VerticalSlash(1, 2, 16, forced_columns=0, forced_diagonals=1, least_vertical=1, least_slash=1)
    assert estimate(q, k, pattern)[1][0, 0].tolist() == [0, 13]


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize(
    ("length", "keys"), [(63, 63), (64, 64), (65, 65), (127, 127), (129, 129), (1, 70), (70, 139), (64, 192)]
)
def test_covers_all_lines_and_nothing_of_the_future(length, keys):
    """Each key once: in a tile, or as a column outside of all tiles."""
    rng = np.random.default_rng(length)
    columns, diagonals = (np.stack([[rng.permutation(keys)[:7] for _ in range(2)]]) for _ in range(2))
    tiles, single = (np.asarray(x) for x in lists_of(columns, diagonals, length, keys, 64))
    count = -(-keys // 64)
    for h, i in np.ndindex(2, tiles.shape[1]):
        blocks = tiles[0, i, h][tiles[0, i, h] >= 0]
        assert (np.diff(blocks) > 0).all()
        assert set(blocks) <= set(range(count))
        alone = single[0, i, h][single[0, i, h] >= 0]
        assert not set(alone // 64) & set(blocks)
        need = set()
        for t in range(i * 64, min((i + 1) * 64, length)):
            p = keys - length + t
            need |= {p - d for d in diagonals[0, h] if d <= p}
            assert {c for c in columns[0, h] if c <= p} <= set(alone) | {c for c in columns[0, h] if c // 64 in blocks}
        assert {j // 64 for j in need} <= set(blocks)
        wide = {(keys - length + i * 64 - d + r) // 64 for d in diagonals[0, h] for r in range(64)}
        assert set(blocks) <= wide  # no more than the lines touch


def test_what_it_reads():
    """Values that are one-hot show the weights: those of a softmax over all lines and some more of the past."""
    q, k, _ = qkv(21, 50)
    v = np.broadcast_to(np.eye(50, dtype=np.float32)[None, :, None], (2, 50, 2, 50))
    weights = np.asarray(jit(partial(minference, pattern=SLASHES, block_size=8))(q, k, v))
    columns, diagonals = (np.asarray(x) for x in estimate(q, k, SLASHES))
    read = np.moveaxis(weights > 0, 2, 1)
    for b, h, t in np.ndindex(2, 4, 21):
        p = 29 + t
        need = {c for c in columns[b, h] if c <= p} | {p - d for d in diagonals[b, h] if d <= p}
        got = set(np.flatnonzero(read[b, h, t]))
        assert need <= got <= set(range(p + 1))
    assert read.sum() < 0.9 * 2 * 4 * sum(range(30, 51))
    assert_close(brute_force(read, q, k, v)[0], weights, FLOAT32)


@pytest.mark.slow
def test_every_head_its_pattern():
    q, k, v = qkv(40)
    patterns = [SLASHES, AShape(2, 6), SLASHES, BlockTopK(2)]
    of_heads = [x.astype(np.float64) for x in (q, k)]
    mask = slash_mask(*of_heads)
    past = np.arange(40)[:, None] - np.arange(40)
    mask[:, 1] = (past >= 0) & ((np.arange(40) < 2) | (past < 6))
    mask[:, 3] = top_mask(*of_heads, 2)[:, 3]
    got = jit(partial(minference, pattern=patterns, block_size=8))(q, k, v)
    assert_close(brute_force(mask, q, k, v)[0], got, FLOAT32)


@pytest.mark.parametrize(("length", "keys", "topk"), [(37, 37, 2), (21, 45, 3)])
def test_blocks_of_the_highest_means(length, keys, topk):
    q, k, _ = qkv(length, keys)
    lists = np.asarray(top_blocks(q, k, topk=topk, block_size=8))
    mask = top_mask(q.astype(np.float64), k.astype(np.float64), topk)
    for b, h, t in np.ndindex(2, 4, length):
        got = lists[b, t // 8, h]
        assert set(got[got >= 0]) == set(np.flatnonzero(mask[b, h, t]) // 8)


def test_means_of_blocks():
    """Means are over the tokens that there are, and there is no block of padding alone."""
    q, k, _ = qkv(29)
    for length in (24, 29):
        lists = np.asarray(top_blocks(q[:, :length], k[:, :length], topk=9, block_size=8))
        assert lists.shape == (2, -(-length // 8), 4, -(-length // 8))
    k = np.ones_like(k)
    k[:, :24] = 0.9  # a last block of ones that zeros would dilute
    lists = np.asarray(top_blocks(np.ones_like(q), k, topk=1, block_size=8))
    assert lists[:, -1].tolist() == [[[3]] * 4] * 2


@pytest.mark.slow
def test_search():
    """Of equal sizes each head takes the pattern that it was made for."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 48, 2, 16)).astype(np.float32)
    k = rng.standard_normal((1, 48, 2, 16)).astype(np.float32) / 4
    q[..., 0, 0], k[..., 0, 0] = 8, 0
    k[:, 20, 0, 0] = 8  # the first head reads key 20
    q[..., 1, :] = 0
    turn = 0.6 * np.arange(48)
    q[:, :, 1, :2] = k[:, :, 1, :2] = 4 * np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    candidates = [
        VerticalSlash(2, 1, 8, forced_columns=1, forced_diagonals=1, least_vertical=1, least_slash=1),
        AShape(1, 11),
    ]
    chosen, mass = search_patterns(q, k, candidates, block_size=8)
    assert chosen == candidates
    past = np.arange(48)[:, None] - np.arange(48)
    read = (past >= 0) & ((np.arange(48) < 1) | (past < 11))
    some, all_of = (brute_force(x[None, None], q, k, np.zeros((1, 48, 2, 1)))[1] for x in (read, past >= 0))
    np.testing.assert_allclose(np.exp(some - all_of).mean((0, 1)), mass[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("pattern", {"pattern": [BlockTopK()]}),
        ("vertical", {"pattern": VerticalSlash(0)}),
        ("topk", {"pattern": BlockTopK(0)}),
        ("block_size", {"block_size": 0}),
        ("k", {"pattern": BlockTopK(2), "block_size": 8}),
        ("k", {"keys": 3}),
    ],
)
def test_bad_arguments(argument, options):
    q, k, v = qkv(9, options.pop("keys", 12))
    with pytest.raises(ValueError, match=rf"\b{argument}: got .+; needs .+"):
        minference(q, k, v, **options)
