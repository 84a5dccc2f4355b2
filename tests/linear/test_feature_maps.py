"""Feature maps against their kernels in numpy, and printed goldens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear import delta_rule, linear_attention
from effattn_jax.linear.feature_maps import (
    cosformer,
    dpfp,
    elementwise_product,
    elu_plus_one,
    hedgehog,
    rebased,
    squared_relu,
    sum_normalise,
    t2r,
    taylor,
)
from tests.compiled import jit
from tests.linear import fixture
from tests.linear.det import det, heads
from tests.ratio import FLOAT32, assert_close

relu = lambda x: np.maximum(x, 0)  # noqa: E731


def randn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_elu_plus_one_and_squared_relu():
    x = np.float32([-3, -1e-3, 0, 1e-3, 2])
    assert_close(np.where(x > 0, x + 1, np.exp(x)), elu_plus_one(x), 1e-6)
    np.testing.assert_array_equal(squared_relu(x), relu(x) ** 2)


def test_golden_dpfp():
    with jax.enable_x64(True):
        row = np.asarray(dpfp(det(1, (8, 4))[0], 2))
    want = np.zeros(16)
    want[[0, 1, 2]], want[[9, 10]] = [0.375558, 0.732846, 0.162421], [0.279872, 0.217952]
    np.testing.assert_allclose(row, want, rtol=0, atol=5.1e-7)


def test_dpfp_is_its_loop():
    x, nu = randn(3, 5), 3
    want = np.empty((3, 30))
    r = np.concatenate([relu(x), relu(-x)], axis=-1)
    for i, j in np.ndindex(nu, 10):
        want[:, i * 10 + j] = r[:, j] * r[:, j - i - 1]
    assert_close(want, dpfp(x, nu), 1e-6)
    with pytest.raises(ValueError, match=r"^nu: got 0; needs .+"):
        dpfp(x, 0)


def test_cosformer_kernel():
    """Features of twice the width are relu(q) . relu(k) with cosines of differences as weights; in both the whole of
    attention agrees."""
    length, most = 70, 100
    q, k, v = (randn(2, length, 3, dim, seed=dim) for dim in (5, 6, 7))
    q, k = q[..., :5], k[..., :5]
    positions = np.tile(np.arange(1, length + 1), (2, 1))
    scores = np.einsum("bihk,bjhk->bhij", relu(q), relu(k), dtype=np.float64)
    distance = positions[0][:, None] - positions[0][None]
    scores = np.tril(scores * np.cos(np.pi * distance / (2 * most)))
    assert scores.min() >= 0
    want = np.einsum("bhij,bjhv->bihv", scores, v) / np.maximum(np.moveaxis(scores.sum(-1), 1, 2), 1e-6)[..., None]
    phi = lambda x: cosformer(x, positions, most)  # noqa: E731
    got, _ = jit(lambda q, k, v: linear_attention(phi(q), phi(k), v, eps=0.0, floor=1e-6))(q, k, v)
    assert_close(want, got, FLOAT32)


def test_golden_cosformer():
    with jax.enable_x64(True):
        q, k, v = (heads(det(i, (8, dim))) for i, dim in ((1, 4), (2, 4), (3, 3)))
        positions = np.arange(1, 9)[None]
        out, _ = linear_attention(cosformer(q, positions, 8), cosformer(k, positions, 8), v, eps=0.0, floor=1e-6)
        np.testing.assert_allclose(out.sum(), 4.974542, rtol=0, atol=5.1e-7)
        np.testing.assert_allclose(out[0, -1, 0], [-0.169325, 0.040949, 0.236452], rtol=0, atol=5.1e-7)


def test_taylor_kernel_is_the_polynomial():
    q, k = randn(50, 8, seed=1), randn(50, 8, seed=2)
    s = np.einsum("ik,jk->ij", q, k, dtype=np.float64) / np.sqrt(8)
    assert taylor(q).shape == (50, 1 + 8 + 64)
    assert_close(1 + s + s**2 / 2, jnp.einsum("ik,jk->ij", taylor(q), taylor(k), precision="highest"), 1e-6)


def test_hedgehog():
    x, weight = randn(2, 3, 4, 5), randn(4, 5, 3, seed=1)
    y = np.einsum("bthk,hkf->bthf", x, weight, dtype=np.float64)
    both = np.exp(np.concatenate([y, -y], axis=-1))
    assert_close(both / both.sum(-1, keepdims=True), hedgehog(x, weight), 1e-6)


def test_t2r_and_elementwise_product():
    x, a, b = randn(2, 3, 4, 5), randn(4, 5, 3, seed=1), randn(4, 5, 3, seed=2)
    c, d = randn(4, 3, seed=3), randn(4, 3, seed=4)
    y, z = (np.einsum("bthk,hkf->bthf", x, w, dtype=np.float64) + bias for w, bias in ((a, c), (b, d)))
    assert_close(relu(y), t2r(x, a, c), 1e-6)
    assert_close(y * z, elementwise_product(x, a, c, b, d), 1e-6)


def test_rebased():
    x, gamma, beta = randn(2, 3, 4, 5), randn(4, 5, seed=1), randn(4, 5, seed=2)
    norm = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    assert_close((gamma * norm + beta) ** 2, rebased(x, gamma, beta), 1e-5)


def test_sum_normalise():
    x = np.abs(randn(3, 4))
    assert_close(x / (x.sum(-1, keepdims=True) + 1e-5), sum_normalise(x), 1e-6)
    assert not np.asarray(sum_normalise(np.zeros((2, 4), np.float32))).any()


@pytest.mark.slow
def test_golden_fast_weight_delta():
    with jax.enable_x64(True):
        phi = lambda x: sum_normalise(dpfp(heads(x), 2))  # noqa: E731
        q, k, v = det(1, (8, 4)), det(2, (8, 4)), det(3, (8, 3))
        beta = (0.5 + 0.4 * det(6, (8,)))[None, :, None]
        out, state = delta_rule(phi(q), phi(k), heads(v), beta, scale=0.5)
        close = lambda x, want: np.testing.assert_allclose(x, want, rtol=0, atol=5.1e-7)  # noqa: E731
        close(out.sum(), -0.021015)
        close(out[0, -1, 0], [-0.029862, -0.013239, 0.008160])
        close([state.sum(), state[0, 0, 0, 0]], [-1.410645, -0.046866])


def test_fast_weight_reads_what_it_wrote():
    """A key with a single feature, written with beta = 1: the read is v exactly, whatever the memory held."""
    key = np.zeros((1, 1, 1, 8), np.float32)
    key[..., 3] = 1
    v, memory = randn(1, 1, 1, 5), randn(1, 1, 8, 5, seed=1)
    out, _ = delta_rule(key, key, v, np.ones((1, 1, 1), np.float32), scale=1.0, initial_state=memory)
    assert_close(v, out, 1e-6)


@pytest.mark.parametrize("case", ["T1", "T65"])
def test_fixture_based(case):
    def function(x):
        out, _ = linear_attention(taylor(x["q"]), taylor(x["k"]), x["v"], eps=1e-6)
        return {"o": out}

    fixture.assert_matches(function, fixture.load("based")[case])
