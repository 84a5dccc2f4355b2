"""Normalised linear attention against its kernel matrix in numpy, and public implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear import linear_attention
from effattn_jax.linear.feature_maps import elu_plus_one
from tests.compiled import jit
from tests.linear import fixture
from tests.linear.det import det, heads
from tests.linear.engines import every_form
from tests.linear.packings import PACKINGS
from tests.ratio import BFLOAT16_OUT, FLOAT32, assert_close

LENGTH = 196
run = jit(linear_attention, static_argnames=("form", "normalise", "scale"))


def draw(seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, LENGTH, 4, dim)).astype(np.float32) for dim in (16, 16, 10))
    return np.asarray(elu_plus_one(q)), np.asarray(elu_plus_one(k)), v


def kernel_matrix(q, k, v, mask, g=None, eps=1e-6):
    """Row-normalised scores, float64; `mask` [B, T, T]."""
    scores = np.einsum("bihk,bjhk->bhij", q, k, dtype=np.float64)
    if g is not None:
        sums = np.moveaxis(np.cumsum(g, axis=1, dtype=np.float64), 1, 2)
        scores *= np.exp(np.minimum(sums[..., :, None] - sums[..., None, :], 0))
    scores = scores * mask[:, None]
    total = np.moveaxis(scores.sum(-1), 1, 2)[..., None]
    return np.einsum("bhij,bjhv->bihv", scores, v) / (total + eps)


@every_form
def test_golden(form):
    with jax.enable_x64(True):
        q, k, v = (heads(det(i, (8, dim))) for i, dim in ((1, 4), (2, 4), (3, 3)))
        out, state = run(elu_plus_one(q), elu_plus_one(k), v, form=form)
        assert state.shape == (1, 1, 4, 4)
        np.testing.assert_allclose(out.sum(), 3.231612, rtol=0, atol=5.1e-7)
        np.testing.assert_allclose(out[0, -1, 0], [-0.079169, 0.041619, 0.147395], rtol=0, atol=5.1e-7)


@pytest.mark.quick_cases(6)
@every_form
@pytest.mark.parametrize("packing", [None, "straddling", "padding"])
def test_is_the_kernel_matrix(form, packing):
    q, k, v = draw()
    ids = np.zeros((2, LENGTH), np.int32) if packing is None else PACKINGS[packing]
    mask = np.tri(LENGTH) * (ids[:, :, None] == ids[:, None, :]) * (ids >= 0)[:, None, :]
    out, _ = run(q, k, v, segment_ids=None if packing is None else ids, form=form)
    assert_close(kernel_matrix(q, k, v, mask), out, FLOAT32)


@every_form
def test_decay_is_in_the_denominator_too(form):
    q, k, v = draw()
    g = -0.1 * np.abs(np.random.default_rng(1).standard_normal((2, LENGTH, 4))).astype(np.float32)
    out, _ = run(q, k, v, g, form=form)
    assert_close(kernel_matrix(q, k, v, np.tri(LENGTH)[None], g), out, FLOAT32)


@pytest.mark.quick_cases(2)
@every_form
def test_gradients(form):
    q, k, v = draw()
    weights = np.random.default_rng(2).standard_normal(v.shape).astype(np.float32)

    def gradients(attend):
        return jit(jax.grad(lambda x: jnp.sum(attend(*x) * weights)))((q, k, v))

    def matrix(q, k, v):
        scores = jnp.einsum("bihk,bjhk->bhij", q, k, precision="highest") * np.tri(LENGTH, dtype=np.float32)
        total = jnp.moveaxis(scores.sum(-1), 1, 2)[..., None]
        return jnp.einsum("bhij,bjhv->bihv", scores, v, precision="highest") / (total + 1e-6)

    with jax.enable_x64(True):
        q, k, v = (x.astype(np.float64) for x in (q, k, v))
        want = jax.tree.map(np.asarray, gradients(matrix))
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    assert_close(want, gradients(lambda *x: linear_attention(*x, form=form)[0]), FLOAT32)


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("cut", [0, 1, 64, 100, LENGTH])
def test_split_is_one_pass(cut):
    q, k, v = draw()
    want, want_state = run(q, k, v)
    first, state = run(q[:, :cut], k[:, :cut], v[:, :cut])
    second, state = run(q[:, cut:], k[:, cut:], v[:, cut:], initial_state=state)
    assert_close((want, want_state), (jnp.concatenate([first, second], 1), state), FLOAT32)


def test_bfloat16():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw())
    out, state = run(q, k, v)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    want = kernel_matrix(*(np.asarray(x, np.float32) for x in (q, k, v)), np.tri(LENGTH)[None])
    assert_close(want, out.astype(jnp.float32), BFLOAT16_OUT)


@pytest.mark.slow
def test_a_row_without_weight_is_zero():
    q, k, v = draw()
    out, _ = run(q * 0, k, v)
    assert not np.asarray(out).any()
    gradient = jax.grad(lambda q: linear_attention(q, k, v, eps=0.0, floor=1e-6)[0].sum())(q * 0)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("case", ["T1", "T65"])
def test_fixture_normalised(case):
    def function(x):
        out, state = linear_attention(x["q"], x["k"], x["v"], eps=1e-10)
        return {"o": out, "ht": state[..., :-1], "zt": state[..., -1]}

    fixture.assert_matches(function, fixture.load("linear_attn_normalized")[case])


def test_bad_arguments():
    q, k, v = draw()
    with pytest.raises(ValueError, match=r"^v: got shape .+; needs .+"):
        linear_attention(q, k, v[:, :, 0])
    with pytest.raises(ValueError, match=r"^initial_state: got shape .+; needs .+"):
        linear_attention(q, k, v, initial_state=np.zeros((2, 4, 16, 10), np.float32))
