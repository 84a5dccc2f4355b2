"""Inverses of unit lower triangular matrices, on the matrices of the delta rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.test_util import check_grads

from effattn_jax.linear.triangular import unit_lower_inverse
from tests.compiled import jit
from tests.linear.draw import unit
from tests.ratio import error_ratio

inverse = jit(unit_lower_inverse)


def correlated(size, beta, dim=16, batch=3, alike=3.0):
    """beta K K^T of unit keys that share a large part: products of powers of it are huge, the inverse is not."""
    rng = np.random.default_rng(0)
    k = unit(alike * rng.standard_normal(dim) + rng.standard_normal((batch, size, dim)))
    return beta * k @ np.swapaxes(k, 1, 2)


def substituted(lower):
    """In float64."""
    unit_lower = np.tril(np.asarray(lower, np.float64), -1) + np.eye(lower.shape[-1])
    identity = np.eye(lower.shape[-1])
    return np.stack([scipy.linalg.solve_triangular(x, identity, lower=True, unit_diagonal=True) for x in unit_lower])


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("size", [1, 4, 15, 16, 17, 64, 100, 196])
@pytest.mark.quick_cases(4)
def test_equals_substitution_on_correlated_keys(size, beta):
    lower = correlated(size, beta).astype(np.float32)
    want = substituted(lower)
    assert error_ratio(want, inverse(lower)) <= 1e-5
    with jax.enable_x64(True):
        assert error_ratio(want, inverse(lower.astype(np.float64))) <= 1e-12


def test_entries_stay_small_where_powers_do_not():
    """A Neumann product of this matrix passes through entries that float32 cannot cancel again."""
    lower = np.tril(correlated(64, 1.0)[0], -1)
    assert np.abs(np.linalg.matrix_power(lower, 16)).max() > 1e8
    assert np.abs(inverse(lower.astype(np.float32))).max() < 2


def test_reads_only_below_the_diagonal():
    lower = correlated(20, 1.0).astype(np.float32)
    np.testing.assert_array_equal(inverse(lower), inverse(np.tril(lower, -1)))
    gradient = jax.grad(lambda x: (unit_lower_inverse(x) ** 2).sum())(jnp.asarray(lower))
    assert not np.triu(gradient).any()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.quick_cases(1)
def test_derivatives_of_any_order(order):
    with jax.enable_x64(True):
        lower = jnp.asarray(correlated(20, 1.0, batch=1))
        weights = jnp.asarray(np.random.default_rng(1).standard_normal(lower.shape))
        check_grads(
            lambda x: unit_lower_inverse(x) * weights, (lower,), order, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6
        )
