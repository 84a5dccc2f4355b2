"""Mesa against printed goldens, a public implementation, an exact solve, and gated linear attention."""

import jax
import numpy as np
import pytest

from effattn_jax.linear import mesa, scalar_decay
from effattn_jax.linear.mesa import FORMS
from tests.linear import fixture
from tests.linear.det import det, heads
from tests.linear.draw import unit
from tests.linear.engines import every_form
from tests.linear.records.mesa import RECORDS
from tests.linear.suite import Sizes, draw_problem, jit
from tests.ratio import FLOAT32, assert_close

run = jit(mesa, static_argnames=("form", "iterations"))


def drawn(strength="mild", **sizes):
    """Arguments of `mesa` with keys of length one."""
    return draw_problem(RECORDS[0], Sizes(**sizes), strength).inputs


@pytest.mark.quick_cases(3)
@every_form
def test_golden(form):
    length, key_dim = 8, 4
    q, k, v = unit(det(1, (length, key_dim))), unit(det(2, (length, key_dim))), det(3, (length, 4))
    g, beta = -(0.05 + 0.3 * (1 + det(4, (length,)))), 0.5 + 0.4 * det(6, (length,))
    ridge = 0.5 + 0.2 * det(26, (key_dim,))
    with jax.enable_x64(True):
        out, state = run(heads(q), heads(k), heads(v), beta[None, :, None], g[None, :, None], ridge[None], form=form)
        out, r = np.asarray(out)[0, :, 0], np.asarray(state.r)[0, 0]
    close = lambda x, want: np.testing.assert_allclose(x, want, rtol=0, atol=5.1e-7)  # noqa: E731
    close(out.sum(), 0.962875)
    close(out[-1, :3], [0.641391, 0.490048, 0.161942])
    close([r.sum(), r[0, 0]], [-1.249581, -0.472555])


@pytest.mark.parametrize(
    ("case", "form"),
    [
        pytest.param(case, form, marks=() if (case, form) == ("T65", "chunkwise") else pytest.mark.slow)
        for case in fixture.load("mesa_net")
        for form in FORMS
    ],
)
def test_fixture(form, case):
    def function(x):
        out, state = mesa(x["q"], x["k"], x["v"], x["beta"], x["g"], x["lamb"], form=form)
        return {"o": out, "hkk": state.h, "hkv": state.r}

    fixture.assert_matches(function, fixture.load("mesa_net")[case])


@pytest.mark.slow
def test_thirty_iterations_are_the_exact_solve():
    """Also where they are fewer than the dimension and nothing is forgotten; five are not enough there."""
    x = drawn("weak", length=150, key_dim=64, value_dim=8, batch=1, heads=(2, 2, 2))
    want, state = run(**x, form="recurrent")
    assert_close((want, state), run(**x), FLOAT32)
    rough, _ = run(**x, iterations=5)
    assert np.abs(want - rough).max() > 1e-4


@pytest.mark.quick_cases(1)
@every_form
def test_large_ridge_is_gated_linear_attention(form):
    x = drawn()
    ridge = np.full_like(x["ridge"], 1e7)
    want, r = jit(scalar_decay, static_argnames="scale")(
        x["q"], x["k"], x["beta"][..., None] * x["v"], x["log_decay"], scale=1.0
    )
    out, state = run(**x | {"ridge": ridge}, form=form)
    assert_close((want, r), (out * 1e7, state.r), FLOAT32)


def test_it_is_the_least_squares_fit():
    """o_t is the value at q_t of the linear map W that minimises sum_j w_j |W^T k_j - v_j|^2 + tr(W^T ridge W)."""
    x = drawn(length=30, key_dim=6, value_dim=4, batch=1, heads=(1, 1, 1))
    out, _ = run(**x)
    q, k, v, beta, g = (np.float64(x[name][0, :, 0]) for name in ("q", "k", "v", "beta", "log_decay"))
    root = np.sqrt(beta * np.exp(g.sum() - np.cumsum(g)))[:, None]
    rows = np.concatenate([root * k, np.diag(np.sqrt(x["ridge"][0].astype(np.float64)))])
    values = np.concatenate([root * v, np.zeros((6, 4))])
    fit = np.linalg.lstsq(rows, values, rcond=None)[0]
    assert_close(q[-1] @ fit, out[0, -1, 0], FLOAT32)


def test_no_iterations():
    with pytest.raises(ValueError, match=r"^iterations: got 0; needs .+"):
        mesa(**drawn(length=3), iterations=0)
