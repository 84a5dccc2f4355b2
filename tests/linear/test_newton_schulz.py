import jax
import numpy as np
import pytest

from effattn_jax.linear.newton_schulz import newton_schulz
from tests.linear.det import det


def test_golden():
    with jax.enable_x64(True):
        x = np.asarray(newton_schulz(det(33, (3, 4))))
    np.testing.assert_allclose(x.sum(), -0.245301, atol=5.1e-7)
    np.testing.assert_allclose(x[0, :3], [-0.262221, 0.070911, 0.378465], atol=5.1e-7)
    np.testing.assert_allclose(np.linalg.svd(x, compute_uv=False), [1.103732, 0.771202, 0], atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 24, 8), (2, 8, 24)])
def test_singular_values_come_near_one(shape):
    matrix = np.random.default_rng(0).standard_normal(shape, np.float32)
    values = np.linalg.svd(np.asarray(newton_schulz(matrix, steps=10)), compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_tall_is_the_transpose_of_wide():
    matrix = np.random.default_rng(0).standard_normal((9, 5), np.float32)
    np.testing.assert_allclose(newton_schulz(matrix), newton_schulz(matrix.T).T, atol=1e-6)
