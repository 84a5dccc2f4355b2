"""The algebra of masks against predicates in plain Python, pair by pair."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse.listed_masks import BlockList, Documents, GlobalKeys, GlobalQueries
from effattn_jax.sparse.masks import EMPTY, FULL, PARTIAL, Causal, SameBlock, Sinks, Stride, Summary, Window

SIZE = 29
IDS = np.array([-1, 0, 0, 0, -1, 0, 2, 3, 3, 3, 3, 3, 5, -3, -1, 5, 5, 5, 9, 9, 9, 9, 9, 9, 9, 9, -1, 9, -2], np.int32)
TABLE = np.random.default_rng(0).random((6, 8)) < 0.6

PRIMITIVES = {
    "causal": (Causal(), lambda p, j: j <= p),
    "window": (Window(6), lambda p, j: p - j in range(6)),
    "itself": (Window(1), lambda p, j: p == j),
    "two-sided window": (Window(4, two_sided=True), lambda p, j: p - j in range(-3, 4)),
    "everything near": (Window(100, two_sided=True), lambda p, j: True),
    "sinks": (Sinks(5), lambda p, j: j < 5),
    "no sinks": (Sinks(0), lambda p, j: False),
    "stride": (Stride(4), lambda p, j: (p - j) % 4 == 0),
    "stride and phase": (Stride(5, 3), lambda p, j: (p - j) % 5 == 3),
    "every step": (Stride(1), lambda p, j: True),
    "same block": (SameBlock(6), lambda p, j: p // 6 == j // 6),
    "summary": (Summary(7, 2), lambda p, j: j % 7 in (5, 6)),
    "shifted summary": (Summary(8, 3, 2), lambda p, j: j % 8 in (3, 4, 5)),
    "a summary of all": (Summary(4, 4), lambda p, j: True),
    "global keys": (GlobalKeys((9, 2, 3, 4, 28, 2)), lambda p, j: j in (2, 3, 4, 9, 28)),
    "no global keys": (GlobalKeys(()), lambda p, j: False),
    "global queries": (GlobalQueries((0, 11, 12, 27)), lambda p, j: p in (0, 11, 12, 27)),
    "documents": (Documents(IDS), lambda p, j: IDS[p] == IDS[j] >= 0),
    "padding": (Documents(np.full(SIZE, -1)), lambda p, j: False),
    "blocks": (BlockList(TABLE, 5, 4), lambda p, j: bool(TABLE[p // 5, j // 4])),
    "few blocks": (BlockList(TABLE[:2, :3], 5, 4), lambda p, j: p < 10 and j < 12 and bool(TABLE[p // 5, j // 4])),
}
KEY_IDS = np.where(np.arange(SIZE) % 3 == 0, -1, IDS)
COMBINED = {
    "dilated": (Stride(3) & Window(10), lambda p, j: 0 <= p - j < 10 and (p - j) % 3 == 0),
    "first and last": (Window(4) | (Sinks(3) & Causal()), lambda p, j: j <= p and (j < 3 or p - j < 4)),
    "three": (
        Causal() & Documents(IDS) & SameBlock(5),
        lambda p, j: j <= p and IDS[p] == IDS[j] >= 0 and p // 5 == j // 5,
    ),
    "keys of other ids": (Documents(IDS, KEY_IDS), lambda p, j: IDS[p] == KEY_IDS[j] >= 0),
    "never decreasing, but here": (Documents(IDS[::-1]), lambda p, j: IDS[::-1][p] == IDS[::-1][j] >= 0),
}


def matrix(predicate):
    return np.array([[predicate(p, j) for j in range(SIZE)] for p in range(SIZE)])


def all_tiles(seed, count=4000):
    """Ends of random tiles, small ones often."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, SIZE, (2, count))
    last = np.minimum(first + rng.geometric(0.3, (2, count)) - 1, SIZE - 1)
    return first[0], last[0], first[1], last[1]


def classes(allowed, tiles):
    return np.array(
        [
            EMPTY if not part.any() else FULL if part.all() else PARTIAL
            for a, b, c, d in zip(*tiles, strict=True)
            for part in [allowed[a : b + 1, c : d + 1]]
        ]
    )


@pytest.mark.quick_cases(12)
@pytest.mark.parametrize("case", PRIMITIVES | COMBINED)
def test_is_its_predicate(case):
    mask, predicate = (PRIMITIVES | COMBINED)[case]
    positions = np.arange(SIZE)
    got = mask(positions[:, None], positions[None, :])
    assert got.dtype == bool
    np.testing.assert_array_equal(matrix(predicate), got)
    one = mask(jnp.asarray(7), jnp.asarray(3))
    assert bool(one) == predicate(7, 3)


@pytest.mark.parametrize("case", PRIMITIVES)
def test_classes_of_tiles_are_exact(case):
    mask, predicate = PRIMITIVES[case]
    tiles = all_tiles(1)
    np.testing.assert_array_equal(classes(matrix(predicate), tiles), mask.tiles(*tiles))


@pytest.mark.parametrize("case", COMBINED)
def test_classes_of_combined_masks_are_never_wrong(case):
    mask, predicate = COMBINED[case]
    tiles = all_tiles(2)
    want, got = classes(matrix(predicate), tiles), mask.tiles(*tiles)
    np.testing.assert_array_equal(want[got != PARTIAL], got[got != PARTIAL])
    if "decreasing" not in case:
        assert np.mean(got == want) > 0.5  # it does not call everything partial


@pytest.mark.parametrize("case", PRIMITIVES | COMBINED)
def test_tiles_broadcast(case):
    mask, _ = (PRIMITIVES | COMBINED)[case]
    starts = np.arange(0, SIZE - 4, 4)
    grid = mask.tiles(starts[:, None], starts[:, None] + 3, starts[None, :], starts[None, :] + 3)
    flat = [mask.tiles(a, a + 3, b, b + 3) for a, b in itertools.product(starts, starts)]
    np.testing.assert_array_equal(np.reshape(flat, grid.shape), grid)


def test_masks_are_pytrees_and_static():
    mask = Causal() & (Sinks(2) | Window(3)) & BlockList(TABLE, 5, 4)
    assert jax.tree.leaves(mask) == []
    assert mask == Causal() & (Sinks(2) | Window(3)) & BlockList(TABLE.copy(), 5, 4)
    assert hash(mask) == hash(Causal() & (Sinks(2) | Window(3)) & BlockList(TABLE.copy(), 5, 4))
    assert mask != Causal() & (Sinks(2) | Window(4)) & BlockList(TABLE, 5, 4)
    assert BlockList(TABLE, 5, 4) != BlockList(~TABLE, 5, 4)

    rows = np.stack([IDS, np.sort(IDS)])
    positions = np.arange(SIZE)
    of_row = jax.jit(jax.vmap(lambda mask: mask(positions[:, None], positions[None, :])))
    got = of_row(Causal() & Documents(rows))
    for row, ids in zip(got, rows, strict=True):
        np.testing.assert_array_equal(matrix(lambda p, j: j <= p and ids[p] == ids[j] >= 0), row)  # noqa: B023


def test_documents_that_are_not_known_are_partial():
    def trace(ids):
        np.testing.assert_array_equal(Documents(ids).tiles(*all_tiles(1)), PARTIAL)
        return ids

    jax.eval_shape(trace, IDS)


def test_which_masks_are_of_distances():
    assert all(m.relative for m in (Causal(), Window(3), Stride(2), Causal() & Stride(2), Causal() | Window(2)))
    assert not any(m.relative for m in (Sinks(1), Causal() & Sinks(1), SameBlock(2), Window(2) | GlobalKeys((1,))))


BAD = {
    "no window": ("window", lambda: Window(0)),
    "a window of yes": ("window", lambda: Window(True)),
    "no step": ("step", lambda: Stride(0)),
    "a phase that never comes": ("phase", lambda: Stride(2, 2)),
    "less than no sinks": ("count", lambda: Sinks(-1)),
    "blocks of nothing": ("size", lambda: SameBlock(0)),
    "more columns than there are": ("columns", lambda: Summary(4, 3, 2)),
    "a position before the first": ("positions", lambda: GlobalKeys((-1,))),
    "a list for a table": ("table", lambda: BlockList([True], 2, 2)),
    "blocks of no keys": ("key_size", lambda: BlockList(TABLE, 2, 0)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    argument, make = BAD[case]
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+"):
        make()
