"""Diagonal scans and the RG-LRU against printed goldens, public implementations and matrix memories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear import diagonal_scan, rg_lru, vector_decay
from effattn_jax.linear.diagonal_scan import FORMS
from effattn_jax.linear.rg_lru import clipped_sqrt
from tests.compiled import jit
from tests.linear import fixture
from tests.linear.det import det
from tests.linear.draw import log_decays
from tests.ratio import FLOAT32, assert_close

every_form = pytest.mark.parametrize("form", FORMS)
sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731


def _cases(op, *quick):
    return pytest.mark.parametrize(
        ("case", "form"),
        [
            pytest.param(case, form, marks=() if case in quick and form == "chunkwise" else pytest.mark.slow)
            for case in fixture.load(op)
            for form in FORMS
        ],
    )


@_cases("hgrn", "T65", "T130_strong")
def test_fixture_hgrn(form, case):
    def function(x):
        h, state = diagonal_scan(x["x"], x["g"], initial_state=x.get("h0"), form=form)
        return {"o": h, "ht": state}

    fixture.assert_matches(function, fixture.load("hgrn")[case])


@_cases("rg_lru", "T65", "T65_reset")
def test_fixture_rg_lru(form, case):
    """Positions that start again are documents; rows begin at position 0, so the state before them does not count."""
    case = fixture.load("rg_lru")[case]
    positions = case["in"]["pos"]
    assert not positions[:, 0].any()
    ids = np.cumsum(positions == 0, axis=1)

    def function(x):
        h, state = rg_lru(
            x["x"],
            jax.nn.sigmoid(x["ga"]),
            jax.nn.sigmoid(x["gx"]),
            x["a_param"],
            initial_state=x.get("h0"),
            fresh=jnp.ones(len(positions), bool),
            segment_ids=ids,
            form=form,
        )
        return {"o": h, "ht": state}

    inputs = {name: x for name, x in case["in"].items() if name != "pos"}
    fixture.assert_matches(function, case | {"in": inputs})


@every_form
def test_golden_rg_lru(form):
    x, r, i = (det(s, (8, 4))[None] for s in (1, 2, 3))
    with jax.enable_x64(True):
        h, state = jit(rg_lru, static_argnames="form")(x, sigmoid(r), sigmoid(i), det(4, (4,)), form=form)
    h = np.asarray(h)
    np.testing.assert_allclose(h.sum(), -3.158560, rtol=0, atol=5.1e-7)
    np.testing.assert_allclose(h[0, -1, :3], [-0.032816, 0.168095, 0.246137], rtol=0, atol=5.1e-7)
    np.testing.assert_array_equal(state[0], h[0, -1])


def test_first_token_is_written_whole_only_where_a_document_starts():
    rng = np.random.default_rng(0)
    x, r, i = (rng.uniform(0.1, 0.9, (3, 6, 4)).astype(np.float32) for _ in range(3))
    rate, state = rng.standard_normal(4, np.float32), rng.standard_normal((3, 4), np.float32)
    ids = np.array([[-1, 3, 3, 5, -1, 5], [0, 0, 0, 0, 1, 1], [-1, -1, -1, -1, -1, -1]])
    fresh = np.array([False, True, True])
    h, last = rg_lru(x, r, i, rate, initial_state=state, fresh=fresh, segment_ids=ids)
    for row, token, whole in ((0, 1, False), (0, 3, True), (0, 5, False), (1, 0, True), (1, 1, False), (1, 4, True)):
        equal = np.allclose(h[row, token], i[row, token] * x[row, token], rtol=1e-6)
        assert equal == whole, (row, token)
    a = np.exp(-8 * r[0, 1] * np.log1p(np.exp(rate)))
    np.testing.assert_allclose(h[0, 1], a * state[0] + np.sqrt(1 - a**2) * i[0, 1] * x[0, 1], rtol=1e-5)
    np.testing.assert_array_equal(last[2], 0)  # fresh, and no token yet


def test_gradients_are_finite_where_nothing_decays():
    """a -> 1 by the gate or by Lambda, to the last bit."""
    x = np.ones((1, 5, 3), np.float32)
    r = np.stack([[1e-12, 0.5, 0.0]] * 5)[None].astype(np.float32)
    rate = np.array([0, -120, 3], np.float32)
    loss = lambda r, rate: jnp.sum(rg_lru(x, r, x / 2, rate)[0])  # noqa: E731
    value, grads = jax.value_and_grad(loss, (0, 1))(r, rate)
    assert np.isfinite(value)
    for grad in grads:
        assert np.isfinite(grad).all()
    for at, slope in ((0.0, 1000), (1e-8, 1000), (0.25, 1.0), (4.0, 0.25)):
        np.testing.assert_allclose(jax.grad(clipped_sqrt)(at), slope, rtol=1e-5)
        assert np.isfinite(jax.grad(jax.grad(clipped_sqrt))(at))


@every_form
@pytest.mark.parametrize("strength", [pytest.param("mild", marks=pytest.mark.slow), "strong"])
@pytest.mark.quick_cases(1)
def test_is_vector_decay_that_reads_its_values(form, strength):
    """Channels as keys, one value, and a query for every channel that reads it alone."""
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 70, 8), np.float32), log_decays(rng, (2, 70, 8), strength)
    h, state = jit(diagonal_scan, static_argnames="form")(x, g, form=form)
    ones = np.ones((2, 70, 1, 1), np.float32)
    for channel in range(8):
        q = np.broadcast_to(np.eye(8, dtype=np.float32)[channel], (2, 70, 1, 8))
        out, memory = jit(lambda q: vector_decay(q, x[:, :, None], ones, g[:, :, None], scale=1.0))(q)
        assert_close((out[:, :, 0, 0], memory[:, 0, :, 0]), (h[..., channel], state), FLOAT32)


@pytest.mark.parametrize("argument", ["r", "i", "rate"])
def test_bad_gates_of_rg_lru(argument):
    arguments = {name: np.zeros((2, 5, 3), np.float32) for name in "xri"} | {"rate": np.zeros(3, np.float32)}
    arguments[argument] = arguments[argument][..., :-1]
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+"):
        rg_lru(**arguments)
