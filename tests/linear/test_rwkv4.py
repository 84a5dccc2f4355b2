"""The memory of RWKV-4 against a fixture, with keys beyond float32, and as an average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear.rwkv4 import FORMS, RWKV4Memory, rwkv4
from tests.compiled import jit
from tests.linear import fixture
from tests.ratio import FLOAT32, assert_close

run = jit(rwkv4, static_argnames="form")
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.mark.parametrize(
    ("case", "form"),
    [
        pytest.param(case, form, marks=() if (case, form) == ("T65", "recurrent") else pytest.mark.slow)
        for case in fixture.load("rwkv4_wkv")
        for form in FORMS
    ],
)
def test_fixture(form, case):
    """The maximum too, and gradients through it."""

    def function(x):
        out, state = rwkv4(x["k"], x["v"], -jnp.exp(x["w"]), x["u"], form=form)
        return {"o": out, "num": state.numerator, "den": state.denominator, "mx": state.maximum}

    fixture.assert_matches(function, fixture.load("rwkv4_wkv")[case])


@every_form
@pytest.mark.quick_cases(1)
def test_a_constant_added_to_all_keys_changes_nothing(form):
    """Neither 2000, of which the exponential overflows, nor -2000, of which it is 0."""
    x = {name: a.astype(np.float64) for name, a in fixture.load("rwkv4_wkv")["T65"]["in"].items()}
    k, v, g, u = x["k"], x["v"], -np.exp(x["w"]), x["u"]
    with jax.enable_x64(True):
        want, state = run(k, v, g, u, form=form)
        for constant in (2000, -2000):
            out, moved = run(k + constant, v, g, u, form=form)
            assert_close((want, state), (out, moved._replace(maximum=moved.maximum - constant)), 1e-10)


@every_form
@pytest.mark.quick_cases(1)
def test_equal_keys_without_decay_average_the_past(form):
    """Over 2000 tokens. The bonus counts a token twice where it is read, log 2."""
    v = np.random.default_rng(0).standard_normal((1, 2000, 3), np.float32)
    out, state = run(np.full_like(v, 50), v, np.zeros(3, np.float32), np.full(3, np.log(2), np.float32), form=form)
    total, count = np.cumsum(v, axis=1, dtype=np.float64), np.arange(1, 2001)[:, None]
    assert_close((total + v) / (count + 1), out, FLOAT32)
    assert_close(RWKV4Memory(total[:, -1], np.full((1, 3), 2000), np.full((1, 3), 50)), state, FLOAT32)


@every_form
@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("key", [-300, 300])
def test_a_denominator_of_0_is_no_memory(form, key):
    """Whatever its maximum, and whatever padding comes first: the first token is read as it is."""
    k = np.full((1, 5, 2), key, np.float32)
    v = np.arange(10, dtype=np.float32).reshape(k.shape)
    ids = np.array([[-1, -1, 0, 0, -1]])

    def first(state):
        out, _ = rwkv4(k, v, -np.ones(2, np.float32), v[0, 0], initial_state=state, segment_ids=ids, form=form)
        return out[:, 2].sum(), out

    state = RWKV4Memory(*np.zeros((3, 1, 2), np.float32))
    (_, out), gradient = jit(jax.value_and_grad(first, has_aux=True))(state)
    np.testing.assert_array_equal(out[:, :3], np.where(ids[:, :3, None] < 0, 0, v[:, :3]))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, gradient)))


@pytest.mark.slow
def test_recurrent_keeps_no_memory_per_token():
    """Less than the three numbers a channel of it has; 3.7 times as much where nothing is computed anew."""
    k, g = np.zeros((1, 1024, 64), np.float32), np.zeros(64, np.float32)
    gradient = jax.grad(lambda k, v, g, u: rwkv4(k, v, g, u, form="recurrent")[0].sum(), argnums=(0, 1, 2, 3))
    memory = jit(gradient).lower(k, k, g, g).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * k.nbytes


@pytest.mark.parametrize("field", RWKV4Memory._fields)
@pytest.mark.parametrize("change", [lambda x: x[:, 1:], lambda x: x[None], lambda x: x.astype(np.int32)])
def test_bad_state(field, change):
    x = fixture.load("rwkv4_wkv")["T1"]["in"]
    state = RWKV4Memory(*np.ones((3, 2, 16), np.float32))
    state = state._replace(**{field: change(getattr(state, field))})
    with pytest.raises(ValueError, match=rf"^initial_state.{field}: got (shape|dtype) .+; needs .+"):
        rwkv4(x["k"], x["v"], -np.exp(x["w"]), x["u"], initial_state=state)
