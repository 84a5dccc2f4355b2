"""Vector decay against printed goldens, public implementations, and the mechanisms it contains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear import scalar_decay, vector_decay
from effattn_jax.linear.vector_decay import FORMS
from tests.compiled import jit
from tests.linear import fixture
from tests.linear.det import det, heads
from tests.linear.engines import every_form
from tests.ratio import FLOAT32, assert_close

T, K, V = 8, 4, 3
q, k, v, u = det(1, (T, K)), det(2, (T, K)), det(3, (T, V)), det(7, (K,))
gv = -(0.05 + 0.3 * (1 + det(5, (T, K))))
softplus = lambda x: np.logaddexp(0, x)  # noqa: E731
sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731

run = jit(vector_decay, static_argnames=("scale", "form"))


def call(q, k, v, g, *, form, bonus=None, scale=1.0):
    """One head in float64: out [T, V] and state [K, V]."""
    bonus = None if bonus is None else bonus[None]
    with jax.enable_x64(True):
        out, state = run(heads(q), heads(k), heads(v), heads(g), bonus=bonus, scale=scale, form=form)
        return np.asarray(out)[0, :, 0], np.asarray(state)[0, 0]


def assert_printed(out, state, printed_sum, printed_last, printed_state):
    close = lambda x, want: np.testing.assert_allclose(x, want, rtol=0, atol=5.1e-7)  # noqa: E731
    close(out.sum(), printed_sum)
    close(out[-1], printed_last)
    close([state.sum(), state[0, 0]], printed_state)


@every_form
def test_golden_vector_decay(form):
    got = call(q, k, v, gv, form=form)
    assert_printed(*got, -5.473014, [-1.084980, -0.592893, 0.113052], [-0.502800, -0.283555])


@every_form
def test_golden_gla(form):
    got = call(q, k, v, -softplus(-det(5, (T, K))) / 16, scale=None, form=form)
    assert_printed(*got, -0.527960, [-0.000693, 0.614223, 1.007587], [8.166638, 0.613744])


@every_form
def test_golden_hgrn2(form):
    keep = 0.2 + 0.8 * sigmoid(det(5, (T, K)))
    got = call(q * sigmoid(q), 1 - keep, v, np.log(keep), form=form)
    assert_printed(*got, 0.634198, [-0.408705, -0.527261, -0.455632], [-3.552531, -0.369508])


@every_form
def test_golden_rwkv6(form):
    got = call(q, k, v, gv, bonus=u, form=form)
    assert_printed(*got, 0.224262, [-1.449367, -0.849430, 0.056900], [-0.502800, -0.283555])


def _cases(op, *quick):
    """All forms of all cases; the quick ones are those of the default form."""
    return pytest.mark.parametrize(
        ("case", "form"),
        [
            pytest.param(case, form, marks=() if case in quick and form == "chunkwise" else pytest.mark.slow)
            for case in fixture.load(op)
            for form in FORMS
        ],
    )


@_cases("gla", "T65", "T130_strong")
@pytest.mark.quick_cases(1)
def test_fixture_gla(form, case):
    def function(x):
        out, state = vector_decay(x["q"], x["k"], x["v"], x["g"], initial_state=x.get("h0"), form=form)
        return {"o": out, "ht": state}

    fixture.assert_matches(function, fixture.load("gla")[case])


@_cases("rwkv6", "T65", "T130_strong")
@pytest.mark.quick_cases(1)
def test_fixture_rwkv6(form, case):
    def function(x):
        out, state = vector_decay(x["q"], x["k"], x["v"], x["w"], bonus=x["u"], initial_state=x.get("h0"), form=form)
        return {"o": out, "ht": state}

    fixture.assert_matches(function, fixture.load("rwkv6")[case])


@pytest.mark.slow
@_cases("rwkv5", "T65")
def test_fixture_rwkv5(form, case):
    def function(x):
        out, state = vector_decay(
            x["q"], x["k"], x["v"], x["w"], bonus=x["u"], scale=1.0, initial_state=x.get("h0"), form=form
        )
        return {"o": out, "ht": state}

    fixture.assert_matches(function, fixture.load("rwkv5")[case])


@every_form
@pytest.mark.quick_cases(1)
def test_equal_channels_are_scalar_decay(form):
    x = fixture.load("simple_gla")["T65"]["in"]
    want = jit(scalar_decay, static_argnames="form")(x["q"], x["k"], x["v"], x["g"], form=form)
    per_channel = np.broadcast_to(x["g"][..., None], x["k"].shape)
    assert_close(want, run(x["q"], x["k"], x["v"], per_channel, form=form), FLOAT32)


@every_form
@pytest.mark.quick_cases(1)
def test_no_decay_is_linear_attention(form):
    x = fixture.load("linear_attn")["T65"]["in"]
    want = jit(scalar_decay, static_argnames="form")(x["q"], x["k"], x["v"], form=form)
    assert_close(want, run(x["q"], x["k"], x["v"], np.zeros(x["k"].shape[2:], np.float32), form=form), FLOAT32)


@every_form
@pytest.mark.parametrize("with_bonus", [False, True])
@pytest.mark.quick_cases(1)
def test_constant_decay_per_token_equals_per_head(form, with_bonus):
    """RWKV-6 with a decay that does not depend on the data is RWKV-5."""
    x = fixture.load("rwkv5")["T65"]["in"]
    bonus = x["u"] if with_bonus else None
    want = run(x["q"], x["k"], x["v"], x["w"], bonus=bonus, form=form)
    per_token = np.broadcast_to(x["w"], x["k"].shape)
    assert_close(want, run(x["q"], x["k"], x["v"], per_token, bonus=bonus, form=form), FLOAT32)


@every_form
def test_bonus_of_one_token(form):
    """From no memory, o = scale * (r . (u * k)) v, whatever the decay."""
    x = fixture.load("rwkv6")["T1"]["in"]
    out, state = run(x["q"], x["k"], x["v"], x["w"], bonus=x["u"], scale=3.0, form=form)
    want = 3.0 * np.sum(x["q"] * x["u"] * x["k"], -1, keepdims=True, dtype=np.float64) * x["v"]
    assert_close((want, x["k"][:, 0, :, :, None] * x["v"][:, 0, :, None]), (out, state), FLOAT32)


@pytest.mark.quick_cases(3)
@every_form
def test_hgrn2_without_lower_bound_is_gla_with_tied_keys(form):
    """k = 1 - sigmoid(f), e^g = sigmoid(f): with a state that is their running average."""
    x = fixture.load("gla")["T65"]["in"]
    keep = sigmoid(x["k"].astype(np.float64))
    with jax.enable_x64(True):
        _, state = run(x["q"].astype(np.float64), 1 - keep, np.ones_like(x["v"], np.float64), np.log(keep), form=form)
    want = 1 - np.prod(keep, axis=1)
    np.testing.assert_allclose(state, np.broadcast_to(want[..., None], state.shape), rtol=1e-12)


@pytest.mark.parametrize("argument", ["log_decay", "bonus"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2,), "float32"), ((2, 4), "float32"), ((1, 65, 2), "float32"), ((1, 64, 2, 8), "float32"), ((2, 8), "int32")],
)
def test_bad_gates(argument, shape, dtype):
    x = fixture.load("rwkv5")["T65"]["in"]
    gates = {"log_decay": x["w"], "bonus": x["u"]} | {argument: jnp.zeros(shape, dtype)}
    with pytest.raises(ValueError, match=rf"^{argument}: got (shape|dtype) .+; needs .+"):
        vector_decay(x["q"], x["k"], x["v"], **gates)
