"""Gated slot attention against a public implementation, and the softmax attention it contains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear.gated_slot_attention import FORMS, SlotState, gated_slot_attention
from tests.compiled import jit
from tests.linear import fixture
from tests.linear.engines import every_form
from tests.ratio import FLOAT32, assert_close

run = jit(gated_slot_attention, static_argnames=("scale", "form"))


@pytest.mark.parametrize(
    ("case", "form"),
    [
        pytest.param(case, form, marks=() if (case, form) == ("T65", "recurrent") else pytest.mark.slow)
        for case in fixture.load("gsa")
        for form in FORMS
    ],
)
def test_fixture(form, case):
    """Its keys of slots are [K, M]."""

    def function(x):
        out, state = gated_slot_attention(x["q"], x["k"], x["v"], x["s"], x["g"], form=form)
        return {"o": out, "hk": jnp.swapaxes(state.keys, -1, -2), "hv": state.values}

    fixture.assert_matches(function, fixture.load("gsa")[case])


@every_form
@pytest.mark.quick_cases(1)
def test_a_slot_for_each_token_is_softmax_attention(form):
    """Token t is written to slot t and nothing is forgotten; slots that hold nothing are keys and values of zeros."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 20, 2, size)) for size in (8, 8, 5))
    s = np.broadcast_to(np.eye(20)[None, :, None], (1, 20, 2, 20))
    with jax.enable_x64(True):
        out, state = run(q, k, v, s, np.zeros_like(s), form=form)
    logits = np.einsum("bihk,bjhk->bhij", q, k) * 8**-0.5 * np.tril(np.ones((20, 20)))
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = np.einsum("bhij,bjhv->bihv", weights * np.tril(np.ones((20, 20))), v)
    assert_close((want, SlotState(*(x.swapaxes(1, 2) for x in (k, v)))), (out, state), 1e-12)


@every_form
@pytest.mark.quick_cases(1)
def test_one_slot_holds_what_it_answers(form):
    """A softmax over one slot is 1: the decayed sum of the values, whatever the keys."""
    x = fixture.load("gsa")["T65"]["in"]
    s, g = x["s"][..., :1], x["g"][..., :1]
    out, state = run(x["q"], x["k"], x["v"], s, g, form=form)
    total = np.cumsum(g[..., 0], axis=1, dtype=np.float64)
    want = np.zeros(x["v"].shape)
    for t in range(65):
        weights = np.exp(total[:, t, None] - total[:, : t + 1])[..., None] * s[:, : t + 1]
        want[:, t] = (weights * x["v"][:, : t + 1]).sum(1)
    assert_close((want, want[:, -1, :, None]), (out, state.values), FLOAT32)


@pytest.mark.parametrize("field", ["keys", "values"])
@pytest.mark.parametrize("change", [lambda x: x[:, :, 1:], lambda x: x[None], lambda x: x.astype(np.int32)])
def test_bad_state(field, change):
    x = fixture.load("gsa")["T1"]["in"]
    state = SlotState(np.zeros((2, 2, 6, 8), np.float32), np.zeros((2, 2, 6, 10), np.float32))
    state = state._replace(**{field: change(getattr(state, field))})
    with pytest.raises(ValueError, match=rf"^initial_state.{field}: got (shape|dtype) .+; needs .+"):
        gated_slot_attention(x["q"], x["k"], x["v"], x["s"], x["g"], initial_state=state)
