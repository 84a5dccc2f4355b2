"""Windows of documents and their means, against a loop."""

import itertools

import numpy as np
import pytest

from effattn_jax.sparse.places import places
from effattn_jax.sparse.pooling import complete_windows, mean_pool, visible
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.inputs import documents, randn

SIZES = {"blocks": (4, 4), "overlapping": (6, 2), "the stride does not divide": (5, 3), "every token": (1, 1)}


def expected(ids, length, stride):
    """(start, end) of each window; padding in front of a row is a document, other padding belongs to the one before."""
    edges = [i for i in range(len(ids)) if ids[i] >= 0 and ids[i] not in ids[:i]]
    edges = sorted({0, *edges, len(ids)})
    return [(c, c + length) for a, b in itertools.pairwise(edges) for c in range(a, b - length + 1, stride)]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("case", SIZES)
def test_windows_of_packed_rows(case):
    length, stride = SIZES[case]
    ids = documents(37)
    (x,) = randn(0, (2, 37, 2, 3))
    x = np.where(ids[:, :, None, None] < 0, np.nan, x)

    def run(x, ids):
        windows = complete_windows(37, length, stride, ids)
        return windows, mean_pool(x, windows, length, stride, ids), visible(windows, length, places(20, 37, ids))

    windows, means, seen = jit(run)(x, ids)
    assert windows.start.shape == (2, max(1, 37 // stride))
    for row in range(2):
        want = expected(ids[row], length, stride)
        for n, (start, end) in enumerate(want):
            real = ids[row, start:end] >= 0
            assert windows.start[row, n] == start
            assert windows.valid[row, n] == real.any()
            if real.any():
                assert_close(x[row, start:end][real].mean(0), means[row, n], FLOAT32)
            for t in range(20):
                own = ids[row, 17 + t]
                same = own >= 0 and own in ids[row, : start + 1] and ids[row, :start].max(initial=-1) <= own
                inside = [i for i in range(start, end) if ids[row, i] >= 0]
                same = same and bool(inside) and all(ids[row, i] == own for i in inside)
                assert seen[row, t, n] == (same and end - 1 <= 17 + t)
        assert not np.asarray(windows.valid)[row, len(want) :].any()
        assert not np.asarray(seen)[row, :, len(want) :].any()


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(("keys", "length", "stride"), [(37, 4, 4), (37, 6, 2), (16, 5, 3), (5, 6, 2)])
def test_means_of_one_document(keys, length, stride):
    (x,) = randn(0, (2, keys, 3))
    windows = complete_windows(keys, length, stride)
    means = mean_pool(x, windows, length, stride)
    starts = range(0, keys - length + 1, stride)
    np.testing.assert_array_equal(np.asarray(windows.start)[np.asarray(windows.valid)], starts)
    for n, start in enumerate(starts):
        assert_close(x[:, start : start + length].mean(1), means[:, n], FLOAT32)


@pytest.mark.slow
def test_the_mean_of_a_constant_is_the_constant():
    x = np.full((1, 40, 1), 0.7, np.float32)
    ids = np.repeat([0, 1, -1], [17, 20, 3])[None]
    for segment_ids in (None, ids):
        windows = complete_windows(40, 8, 8, segment_ids)
        means = np.asarray(mean_pool(x, windows, 8, 8, segment_ids))
        np.testing.assert_allclose(means[np.asarray(windows.valid)], 0.7, rtol=2e-7)


@pytest.mark.parametrize(("length", "stride", "name"), [(4, 0, "kernel_stride"), (2, 4, "kernel_size")])
def test_bad_sizes(length, stride, name):
    with pytest.raises(ValueError, match=f"{name}: got .+; needs .+"):
        complete_windows(16, length, stride)
