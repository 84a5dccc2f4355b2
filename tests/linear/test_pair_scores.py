"""Scores between the tokens of a chunk under vector gates, against sums over pairs in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear.pair_scores import pair_scores, vector_decay_sums
from tests.linear.draw import log_decays
from tests.linear.suite import STRENGTHS, jit
from tests.ratio import BFLOAT16_OUT, assert_close

LEAD, K = (2, 3), 8
LIMIT = 1e-6


def oracle(x, y, g, before=False):
    """Every exponent is the sum of the gates between the two tokens."""
    x, y, g = (np.asarray(a, np.float64) for a in (x, y, g))
    size = x.shape[-2]
    scores = np.zeros((*x.shape[:-1], size))
    for i in range(size):
        for j in range(i + (not before)):
            between = g[..., j + 1 : i + (not before), :].sum(-2)
            scores[..., i, j] = (x[..., i, :] * y[..., j, :] * np.exp(between)).sum(-1)
    return scores


def draw(size, strength):
    rng = np.random.default_rng(size)
    x, y = rng.standard_normal((2, *LEAD, size, K), np.float32)
    return x, y, log_decays(rng, (*LEAD, size, K), strength), rng.standard_normal((*LEAD, size, size), np.float32)


def scores(x, y, g, before=False):
    return pair_scores(x, y, vector_decay_sums(g), jnp.ones((), bool), before=before)


@jit
def value_and_gradients(x, y, g, weights):
    loss = lambda *a, before: jnp.sum(weights * scores(*a, before=before))  # noqa: E731
    return [(scores(x, y, g, b), jax.grad(loss, (0, 1, 2))(x, y, g, before=b)) for b in (False, True)]


@pytest.mark.parametrize(
    "size", [1, pytest.param(4, marks=pytest.mark.slow), 23, pytest.param(64, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.quick_cases(1)
def test_scores_and_gradients(size, strength):
    arguments = draw(size, strength)
    got = value_and_gradients(*arguments)
    with jax.enable_x64(True):
        want = value_and_gradients(*(a.astype(np.float64) for a in arguments))
    for before in (False, True):
        assert_close(oracle(*arguments[:3], before), want[before][0], 1e-14)
    assert_close(want, got, LIMIT)


@pytest.mark.parametrize("before", [False, True])
def test_mask_takes_pairs_away(before):
    x, y, g, weights = draw(23, "strong")
    mask = weights > 0
    got = pair_scores(x, y, vector_decay_sums(g), mask, before=before)
    assert_close(np.where(mask, oracle(x, y, g, before), 0), got, LIMIT)


def test_one_gate_for_all_rows():
    """Axes of size 1 of the gates serve all of those of the tokens."""
    x, y, g, _ = draw(23, "mild")
    assert_close(oracle(x, y, np.broadcast_to(g[:1], g.shape)), scores(x, y, g[:1]), LIMIT)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_sums(strength):
    _, _, g, _ = draw(23, strength)
    sums, total = vector_decay_sums(g), np.cumsum(g, -2, dtype=np.float64)
    for want, got in (
        (total, sums.from_start),
        (total - g, sums.from_start_before),
        (total[..., -1:, :] - total, sums.to_end),
        (total[..., -1, :], sums.keep),
    ):
        np.testing.assert_allclose(got, np.exp(want), atol=1e-6)


def test_extreme_gates_stay_finite():
    arguments = draw(64, "extreme")
    for x in jax.tree.leaves(value_and_gradients(*arguments)):
        assert np.isfinite(x).all()


def test_bfloat16_products_are_summed_in_float32():
    x, y, g, _ = draw(23, "mild")
    x, y = (jnp.asarray(a, jnp.bfloat16) for a in (x, y))
    got = scores(x, y, g)
    assert got.dtype == jnp.float32
    assert_close(oracle(x, y, g), got, BFLOAT16_OUT)


def test_no_tensor_of_pairs_and_channels():
    size, width = 256, 32
    x = jnp.zeros((1, size, width))
    gradient = jit(jax.grad(lambda x, y, g: jnp.sum(scores(x, y, g)), (0, 1, 2)))
    memory = gradient.lower(x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.2 * 4 * size * size * width
