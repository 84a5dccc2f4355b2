"""Double sparsity: golden numbers, calibration in any order, and one query over ragged rows against an oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse.double_sparsity import (
    append_labels,
    calibrate,
    channel_means,
    double_sparsity,
    heavy_tokens,
    init_calibration,
    init_labels,
    label_channels,
)
from effattn_jax.sparse.paged_cache import init_paged_cache, rewind
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.brute_force import brute_force
from tests.sparse.golden_inputs import DIGITS, waves
from tests.sparse.inputs import randn
from tests.sparse.records.double_sparsity import CHANNELS, heavy_of_row

LENGTHS = np.array([19, 3, 0, 16])
extend = jit(append_labels)
read = jit(double_sparsity, static_argnames=("heavy",))
choose = jit(heavy_tokens, static_argnames=("heavy",))


def filled(channels=CHANNELS, seed=0):
    """Ragged rows in a cache with NaN in every unused slot."""
    q, k, v = randn(seed, (4, 1, 4, 8), (4, 20, 2, 8), (4, 20, 2, 6))
    cache = init_paged_cache(4, 24, 6, 2, 8, 6, page_size=4, dtype=jnp.float32)
    labels = jnp.full_like(init_labels(cache, channels), jnp.nan)
    cache = cache._replace(k=jnp.full_like(cache.k, jnp.nan), v=jnp.full_like(cache.v, jnp.nan))
    return q + q, k, v, *extend(cache, labels, channels, k, v, LENGTHS)


def chosen(q, k, channels, heavy):
    """[B][H] of lists, highest first."""
    return [heavy_of_row(q[b, 0], k[b, :length], channels, heavy) for b, length in enumerate(LENGTHS)]


def mask_of(lists):
    mask = np.zeros((4, 4, 1, 20), bool)
    for b, h in np.ndindex(4, 4):
        mask[b, h, 0, lists[b][h]] = True
    return mask


def test_table():
    with jax.enable_x64(True):
        q, k, v = waves()
        calibration = calibrate(init_calibration(1, 4), q, k)
        channels = label_channels(calibration, 2)
        cache = init_paged_cache(1, 8, 8, 1, 4, page_size=4, dtype=jnp.float64)
        cache, labels = extend(cache, init_labels(cache, channels), channels, k, v)
        tokens = choose(q[:, 31:], cache, labels, channels, heavy=6)
        assert label_channels(calibration, 4).tolist() == [[3, 1, 0, 2]]
        np.testing.assert_allclose(
            channel_means(calibration)[0], (1.606009, 1.638889, 1.596043, 1.642092), rtol=0, atol=DIGITS
        )
    assert channels.tolist() == [[3, 1]]
    assert sorted(tokens[0, 0].tolist()) == [6, 7, 8, 19, 20, 31]


def test_calibration_counts_all_samples_in_any_order():
    rng = np.random.default_rng(0)
    samples = [(rng.integers(-4, 5, (2, 3, 4, 8)), rng.integers(-4, 5, (2, 3, 2, 8))) for _ in range(3)]
    samples = [[x.astype(np.float32) for x in sample] for sample in samples]  # sums of integers are exact
    orders = []
    for order in ([0, 1, 2], [2, 0, 1]):
        calibration = init_calibration(2, 8)
        for n in order:
            calibration = calibrate(calibration, *samples[n])
        orders.append(calibration)
    jax.tree.map(np.testing.assert_array_equal, *orders)
    want = [
        np.mean([abs(q[..., h, :] * k[..., h // 2, :]) for q, k in samples for h in hs], (0, 1, 2))
        for hs in ((0, 1), (2, 3))
    ]
    np.testing.assert_allclose(channel_means(orders[0]), want, rtol=1e-6)


@pytest.mark.parametrize("heavy", [7, 1])
@pytest.mark.quick_cases(1)
def test_is_the_softmax_over_the_heavy_tokens(heavy):
    """With fewer tokens than `heavy` in a row, no unused slot is read; a row of no token returns 0."""
    q, k, v, cache, labels = filled()
    lists = chosen(q, k, CHANNELS, heavy)
    got = np.asarray(choose(q, cache, labels, CHANNELS, heavy=heavy))
    for b, h in np.ndindex(4, 4):
        assert got[b, h].tolist() == lists[b][h] + [-1] * (heavy - len(lists[b][h]))
    assert_close(brute_force(mask_of(lists), q, k, v)[0], read(q, cache, labels, CHANNELS, heavy=heavy), FLOAT32)


def test_all_channels_are_the_exact_ranking():
    channels = np.stack([np.random.default_rng(h).permutation(8) for h in range(2)])
    q, k, v, cache, labels = filled(channels)
    mask = mask_of(chosen(q, k, [range(8)] * 2, 5))
    assert_close(brute_force(mask, q, k, v)[0], read(q, cache, labels, channels, heavy=5), FLOAT32)


def test_a_large_budget_is_dense():
    q, k, v, cache, labels = filled()
    mask = np.broadcast_to(np.arange(20) < LENGTHS[:, None, None, None], (4, 4, 1, 20))
    assert_close(brute_force(mask, q, k, v)[0], read(q, cache, labels, CHANNELS, heavy=100), FLOAT32)


def test_labels_after_a_rewind():
    """The tokens that were taken back are overwritten, labels too."""
    q, k, v, cache, labels = filled()
    k2, v2 = randn(5, k.shape, v.shape)
    cache, labels = extend(rewind(cache, LENGTHS // 2), labels, CHANNELS, k2, v2, LENGTHS - LENGTHS // 2)
    for b, length in enumerate(LENGTHS):
        for x, y in ((k, k2), (v, v2)):
            x[b, length // 2 : length] = y[b, : length - length // 2]
    mask = mask_of(chosen(q, k, CHANNELS, 7))
    assert_close(brute_force(mask, q, k, v)[0], read(q, cache, labels, CHANNELS, heavy=7), FLOAT32)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("heavy", lambda q, c, x: double_sparsity(q, c, x, CHANNELS, heavy=0)),
        ("channels", lambda q, c, x: double_sparsity(q, c, x, CHANNELS[:, :2])),
        ("labels", lambda q, c, x: double_sparsity(q, c, x[:2], CHANNELS)),
        ("channels", lambda q, c, x: label_channels(init_calibration(2, 8), 9)),
        ("k", lambda q, c, x: calibrate(init_calibration(2, 8), q, q)),
    ],
)
def test_bad_arguments(argument, call):
    q, _, _, cache, labels = filled()
    with pytest.raises(ValueError, match=rf"\b{argument}: got .+; needs .+"):
        call(q, cache, labels)
