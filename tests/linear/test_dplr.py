"""DPLR against printed goldens, public implementations, and the mechanisms it contains."""

import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear import delta_rule, dplr, scalar_decay, vector_decay
from effattn_jax.linear.dplr import FORMS
from tests.compiled import jit
from tests.linear import fixture
from tests.linear.det import det
from tests.linear.draw import log_decays, unit
from tests.linear.engines import every_form
from tests.linear.printed import assert_printed, cases, one_head
from tests.ratio import FLOAT32, assert_close

T, K, V = 8, 4, 3
q, k, v = det(1, (T, K)), det(2, (T, K)), det(3, (T, V))
kn, beta = unit(k), 0.5 + 0.4 * det(6, (T, 1))
gs, gv = (-(0.05 + 0.3 * (1 + det(s, shape))) for s, shape in ((4, (T,)), (5, (T, K))))
sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731

run = jit(dplr, static_argnames=("scale", "form"))


@every_form
@pytest.mark.quick_cases(1)
def test_golden_gated_delta_net_2(form):
    """Erased and written channel by channel: a = -e^g erase k, b = k, values write v."""
    erase, write = 0.5 + 0.4 * det(8, (T, K)), 0.5 + 0.4 * det(9, (T, V))
    inputs = {"q": q, "k": kn, "v": write * v, "a": -np.exp(gv) * erase * kn, "b": kn, "log_decay": gv}
    got = one_head(run, inputs, scale=1.0, form=form)
    assert_printed(got, -2.225200, [-0.372039, -0.597392, -0.492382], [-1.368941, -0.175087])


@every_form
def test_golden_comba(form):
    """The feedback p = 0.8 k reads the state before it decays."""
    inputs = {"q": q, "k": kn, "v": beta * v, "a": -0.8 * kn, "b": beta * kn, "log_decay": gs}
    got = one_head(run, inputs, scale=1.0, form=form)
    assert_printed(got, -2.192982, [-1.010907, -1.107432, -0.804501], [-3.536183, -0.445065])


@every_form
def test_golden_rwkv7(form):
    g = -np.exp(-0.5) * sigmoid(det(5, (T, K)))
    inputs = {"q": q, "k": k, "v": v, "a": -kn, "b": kn * sigmoid(det(8, (T, K))), "log_decay": g}
    got = one_head(run, inputs, scale=1.0, form=form)
    assert_printed(got, -4.386527, [-1.331614, -1.308622, -0.813605], [-4.157524, -0.699854])


@cases("dplr", FORMS, "T65")
@pytest.mark.slow
def test_fixture_dplr(form, case):
    def function(x):
        inputs = [x[name] for name in ("q", "k", "v", "alpha", "beta", "gk")]
        out, state = dplr(*inputs, initial_state=x.get("h0"), form=form)
        return {"o": out, "ht": state}

    fixture.assert_matches(function, fixture.load("dplr")[case])


@cases("rwkv7", FORMS, "T65", "T130_strong")
@pytest.mark.quick_cases(1)
def test_fixture_rwkv7(form, case):
    def function(x):
        inputs = [x[name] for name in ("r", "k", "v", "a", "b", "w")]
        out, state = dplr(*inputs, scale=1.0, initial_state=x.get("h0"), form=form)
        return {"o": out, "ht": state}

    fixture.assert_matches(function, fixture.load("rwkv7")[case])


@cases("comba", FORMS, "T65")
def test_fixture_comba(form, case):
    """The reference lets the feedback p read the decayed state; its kernels and the paper do not."""

    def function(x):
        strength, decay = x["beta"][..., None], jnp.exp(x["g"])[..., None]
        inputs = (x["q"], x["k"], strength * x["v"], -decay * x["p"], strength * x["k"], x["g"])
        out, state = dplr(*inputs, initial_state=x.get("h0"), form=form)
        return {"o": out, "ht": state}

    fixture.assert_matches(function, fixture.load("comba")[case])


def draw(length=70, heads=2, key_dim=16, value_dim=10):
    rng = np.random.default_rng(0)
    randn = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    rows = (2, length, heads, key_dim)
    g = log_decays(rng, rows, "mild")
    return randn(*rows), randn(*rows), randn(2, length, heads, value_dim), g, randn(2, heads, key_dim, value_dim)


@every_form
@pytest.mark.quick_cases(1)
def test_without_low_rank_part_is_vector_decay(form):
    """RWKV-7 whose in-context learning rate is 0, too: b = 0 alone is enough."""
    q, k, v, g, start = draw()
    want = vector_decay(q, k, v, g, initial_state=start, form="recurrent")
    zeros = np.zeros_like(k)
    for a in (zeros, -unit(k)):
        assert_close(want, run(q, k, v, a, zeros, g, initial_state=start, form=form), FLOAT32)


@every_form
@pytest.mark.quick_cases(1)
def test_without_low_rank_part_and_with_one_gate_is_scalar_decay(form):
    q, k, v, g, start = draw()
    gate, zeros = g[..., 0], np.zeros_like(k)
    want = scalar_decay(q, k, v, gate, initial_state=start, form="recurrent")
    for rows in (gate, np.broadcast_to(gate[..., None], g.shape)):
        assert_close(want, run(q, k, v, zeros, zeros, rows, initial_state=start, form=form), FLOAT32)


@every_form
@pytest.mark.quick_cases(1)
def test_gated_delta_net_2_with_constant_gates_is_kimi_delta_attention(form):
    q, k, v, g, start = draw()
    k, strength = unit(k), 0.7
    beta = np.full(g.shape[:3], strength, np.float32)
    want = delta_rule(q, k, v, beta, g, initial_state=start, form="recurrent")
    got = run(q, k, strength * v, -strength * np.exp(g) * k, k, g, initial_state=start, form=form)
    assert_close(want, got, FLOAT32)


@pytest.mark.quick_cases(1)
@every_form
def test_comba_that_feeds_back_the_decayed_key_is_gated_delta_net(form):
    q, k, v, g, start = draw()
    k, gate, strength = unit(k), g[..., 0], np.float32(0.7)
    want = delta_rule(q, k, v, np.full_like(gate, strength), gate, initial_state=start, form="recurrent")
    feedback = np.exp(gate)[..., None] * k
    got = run(q, k, strength * v, -feedback, strength * k, gate, initial_state=start, form=form)
    assert_close(want, got, FLOAT32)


@every_form
@pytest.mark.quick_cases(1)
def test_scale(form):
    q, k, v, g, start = draw()
    default, state = run(q, k, v, -unit(k), 0.5 * unit(k), g, initial_state=start, form=form)
    got = run(q, k, v, -unit(k), 0.5 * unit(k), g, scale=3.0, initial_state=start, form=form)
    assert_close((3.0 * q.shape[-1] ** 0.5 * default, state), got, FLOAT32)


@pytest.mark.parametrize("heads", [(4, 1), (1, 4), (2, 2)])
@pytest.mark.quick_cases(1)
def test_fewer_heads_of_a_and_b_are_repeated(heads):
    q, k, v, g, start = draw(heads=4)
    a, b = -unit(k)[:, :, : heads[0]], 0.5 * unit(k)[:, :, : heads[1]]
    full = (np.repeat(x, 4 // x.shape[2], axis=2) for x in (a, b))
    want = run(q, k, v, *full, g, initial_state=start, form="recurrent")
    assert_close(want, run(q, k, v, a, b, g, initial_state=start), FLOAT32)
