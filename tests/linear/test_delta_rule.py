"""The delta rule against printed goldens and public implementations."""

import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear import delta_rule
from effattn_jax.linear.delta_rule import FORMS
from tests.compiled import jit
from tests.linear import fixture
from tests.linear.det import det
from tests.linear.draw import unit
from tests.linear.engines import every_form
from tests.linear.printed import assert_printed, cases, one_head

T, K, V = 8, 4, 3
q, k, v = det(1, (T, K)), unit(det(2, (T, K))), det(3, (T, V))
beta = 0.5 + 0.4 * det(6, (T,))
gs, gv = (-(0.05 + 0.3 * (1 + det(s, shape))) for s, shape in ((4, (T,)), (5, (T, K))))

run = jit(delta_rule, static_argnames=("scale", "form"))


@every_form
def test_golden_delta(form):
    got = one_head(run, {"q": q, "k": k, "v": v, "beta": beta}, scale=1.0, form=form)
    assert_printed(got, -2.176180, [-0.970796, -1.069925, -0.783128], [-3.558971, -0.442525])


@every_form
def test_golden_gated_delta(form):
    got = one_head(run, {"q": q, "k": k, "v": v, "beta": beta, "log_decay": gs}, scale=1.0, form=form)
    assert_printed(got, -2.117314, [-0.943915, -1.060560, -0.794657], [-3.556500, -0.447786])


@pytest.mark.quick_cases(3)
@every_form
def test_golden_kimi_delta_attention(form):
    got = one_head(run, {"q": q, "k": k, "v": v, "beta": beta, "log_decay": gv}, scale=1.0, form=form)
    assert_printed(got, -1.400218, [-0.583454, -0.641721, -0.468516], [-2.434895, -0.468444])


def product(q, k, v, beta, g, xp=jnp):
    """DeltaProduct with n steps per token as a delta rule over n T tokens: the first decays, the last is read."""
    steps = k.shape[-3] // q.shape[-3]
    place = lambda x, at: xp.stack([x if j == at else xp.zeros_like(x) for j in range(steps)], 2)  # noqa: E731
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])  # noqa: E731
    return {"q": flat(place(q, steps - 1)), "k": k, "v": v, "beta": beta, "log_decay": flat(place(g, 0))}


@every_form
def test_golden_delta_product(form):
    k2, v2, beta2 = unit(det(10, (2 * T, K))), det(11, (2 * T, V)), 1 + 0.8 * det(12, (2 * T,))
    inputs = product(*(x[None, :, None] for x in (q, k2, v2, beta2, gs)), xp=np)
    out, state = one_head(run, {name: x[0, :, 0] for name, x in inputs.items()}, scale=1.0, form=form)
    assert_printed((out[1::2], state), 3.428845, [-0.292209, 0.552915, 1.198600], [3.107447, 0.544910])


def _matches(op, case, form, read=None):
    """`read` makes the engine's arguments from the fixture's."""

    def function(x):
        arguments = {name: value for name, value in x.items() if name not in ("h0", "g")} | {"log_decay": x.get("g")}
        out, state = delta_rule(**(read(x) if read else arguments), initial_state=x.get("h0"), form=form)
        return {"o": out if read is None else out[:, 1::2], "ht": state}

    fixture.assert_matches(function, fixture.load(op)[case])


@pytest.mark.quick_cases(1)
@cases("delta_rule", FORMS, "T65", "T65_neg")
def test_fixture_delta_rule(form, case):
    _matches("delta_rule", case, form)


@pytest.mark.quick_cases(1)
@cases("gated_delta_rule", FORMS, "T65_neg", "T130_strong")
def test_fixture_gated_delta_rule(form, case):
    _matches("gated_delta_rule", case, form)


@cases("kda", FORMS, "T130_strong", "T65_gva")
@pytest.mark.quick_cases(1)
def test_fixture_kimi_delta_attention(form, case):
    """Two heads of q and k serve four of v in T65_gva."""
    _matches("kda", case, form)


@pytest.mark.slow
@cases("gated_delta_product", FORMS, "T65")
def test_fixture_gated_delta_product(form, case):
    """Two steps per token."""
    _matches("gated_delta_product", case, form, lambda x: product(x["q"], x["k"], x["v"], x["beta"], x["g"]))
