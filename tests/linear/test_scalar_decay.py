"""Scalar decay against printed goldens, public implementations, and the mechanisms it contains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear import scalar_decay
from effattn_jax.linear.scalar_decay import FORMS
from tests.compiled import jit
from tests.linear import fixture
from tests.linear.det import det, heads
from tests.linear.engines import every_form
from tests.ratio import FLOAT32, assert_close

T, K, V = 8, 4, 3
q, k, v = det(1, (T, K)), det(2, (T, K)), det(3, (T, V))
gs = -(0.05 + 0.3 * (1 + det(4, (T,))))
softplus = lambda x: np.log1p(np.exp(x))  # noqa: E731

run = jit(scalar_decay, static_argnames=("scale", "form"))


def call(q, k, v, g=None, *, form, scale=1.0):
    """One head in float64: out [T, V] and state [K, V]."""
    g = None if g is None else g[None, :, None]
    with jax.enable_x64(True):
        out, state = run(heads(q), heads(k), heads(v), g, scale=scale, form=form)
        return np.asarray(out)[0, :, 0], np.asarray(state)[0, 0]


def assert_printed(out, printed_sum, printed_last, state=None, printed_state=()):
    close = lambda x, want: np.testing.assert_allclose(x, want, rtol=0, atol=5.1e-7)  # noqa: E731
    close(out.sum(), printed_sum)
    close(out[-1, :3], printed_last)
    if state is not None:
        close([state.sum(), state[0, 0]], printed_state)


@every_form
def test_golden_linear_attention(form):
    out, state = call(q, k, v, form=form)
    assert_printed(out, -0.773475, [0.634596, 2.019010, 2.675159], state, [11.274742, 0.906910])


@every_form
def test_golden_normalised_linear_attention(form):
    """A column of ones in v sums the normaliser."""
    feature = lambda x: np.where(x > 0, x + 1, np.exp(x))  # noqa: E731
    out, _ = call(feature(q), feature(k), np.concatenate([v, np.ones((T, 1))], 1), form=form)
    assert_printed(out[:, :V] / (out[:, V:] + 1e-6), 3.231612, [-0.079169, 0.041619, 0.147395])


@every_form
def test_golden_scalar_decay(form):
    out, state = call(q, k, v, gs, form=form)
    assert_printed(out, -4.174608, [-1.969528, -0.979230, 0.364280], state, [0.297860, 0.017659])


@every_form
def test_golden_mamba2_head(form):
    dt = softplus(det(19, (T,)) - 1)
    out, state = call(det(15, (T, 4)), det(14, (T, 4)), dt[:, None] * v, -0.7 * dt, form=form)
    assert_printed(out + 0.9 * v, -2.214153, [-0.714391, -0.597391, -0.264910], state, [-0.825500, 0.022313])


@every_form
def test_golden_retnet_head(form):
    angle = np.arange(T)[:, None] * 10000.0 ** -np.linspace(0, 1, K // 2)
    pairs = lambda x: x[:, 0::2] + 1j * x[:, 1::2]  # noqa: E731
    rotate = lambda x: (pairs(x) * np.exp(1j * angle)).view(np.float64)  # noqa: E731
    g = np.full(T, np.log(1 - 2.0**-5))
    out, state = call(rotate(q), rotate(k) * K**-0.5, v, g, form=form)
    assert_printed(out, 0.112087, [0.126497, 0.331159, 0.416371], state, [-1.823543, -0.846078])


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


@_cases("linear_attn", "T65")
def test_fixture_linear_attention(form, case):
    """No decay; the reference scales q by K**-0.5."""

    def function(x):
        out, state = scalar_decay(x["q"], x["k"], x["v"], initial_state=x.get("h0"), form=form)
        return {"o": out, "ht": state}

    fixture.assert_matches(function, fixture.load("linear_attn")[case])


@_cases("simple_gla", "T65", "T130_strong")
def test_fixture_simple_gla(form, case):
    def function(x):
        out, state = scalar_decay(x["q"], x["k"], x["v"], x["g"], initial_state=x.get("h0"), form=form)
        return {"o": out, "ht": state}

    fixture.assert_matches(function, fixture.load("simple_gla")[case])


@_cases("retention", "T65")
def test_fixture_retention(form, case):
    """A constant decay 1 - 2^(-5-h) per head."""

    def function(x):
        log_decay = jnp.log1p(-(2.0 ** -(5 + jnp.arange(x["v"].shape[2]))))
        out, _ = scalar_decay(x["q"], x["k"], x["v"], log_decay, form=form)
        return {"o": out}

    fixture.assert_matches(function, fixture.load("retention")[case])


@_cases("mamba2_ssd", "T65", "T130_strong")
def test_fixture_mamba2(form, case):
    """q = C, k = B, v = dt x, g = A dt; two groups of B and C serve four heads; states are transposed."""

    def function(x):
        transposed = lambda state: None if state is None else jnp.swapaxes(state, 2, 3)  # noqa: E731
        out, state = scalar_decay(
            x["C"],
            x["B"],
            x["dt"][..., None] * x["x"],
            x["A"] * x["dt"],
            scale=1.0,
            initial_state=transposed(x.get("h0")),
            form=form,
        )
        return {"o": out + x["D"][:, None] * x["x"], "ht": transposed(state)}

    fixture.assert_matches(function, fixture.load("mamba2_ssd")[case])


@pytest.mark.quick_cases(2)
@every_form
def test_no_decay_equals_zero_decay_equals_cumulative_sum(form):
    """g = 0 is linear attention, however it is written."""
    x = fixture.load("linear_attn")["T65"]["in"]
    batch, length, count, _ = x["q"].shape
    want, state = run(x["q"], x["k"], x["v"], form=form)
    for g in (np.zeros(count, np.float32), np.zeros((batch, length, count), np.float32)):
        assert_close((want, state), run(x["q"], x["k"], x["v"], g, form=form), FLOAT32)
    scores = np.tril(np.einsum("bihk,bjhk->bhij", x["q"], x["k"], dtype=np.float64)) * x["q"].shape[-1] ** -0.5
    assert_close(np.einsum("bhij,bjhv->bihv", scores, x["v"]), want, FLOAT32)


@pytest.mark.quick_cases(3)
@every_form
def test_constant_decay_per_token_equals_per_head(form):
    """Mamba-2 with dt = 1 and A = log gamma is the core of RetNet."""
    x = fixture.load("retention")["T65"]["in"]
    g = np.log1p(-(2.0 ** -(5 + np.arange(4)))).astype(np.float32)
    per_token = np.broadcast_to(g, (*x["q"].shape[:2], 4))
    want = run(x["q"], x["k"], x["v"], g, form=form)
    assert_close(want, run(x["q"], x["k"], x["v"], per_token, form=form), FLOAT32)


@every_form
def test_scale(form):
    x = fixture.load("linear_attn")["T65"]["in"]
    default, state = run(x["q"], x["k"], x["v"], form=form)
    scaled, same = run(x["q"], x["k"], x["v"], scale=3.0, form=form)
    assert_close((3.0 * x["q"].shape[-1] ** 0.5 * default, state), (scaled, same), FLOAT32)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2,), "float32"), ((4, 1), "float32"), ((1, 65, 4, 1), "float32"), ((1, 64, 4), "float32"), ((4,), "int32")],
)
def test_bad_log_decay(shape, dtype):
    x = fixture.load("retention")["T65"]["in"]
    with pytest.raises(ValueError, match=r"^log_decay: got (shape|dtype) .+; needs .+"):
        scalar_decay(x["q"], x["k"], x["v"], jnp.zeros(shape, dtype))


def _loss(form):
    """Of five arrays of heads that share keys, in float64; its gradient is neither linear nor even in any."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))  # noqa: E731
    arrays = {"q": draw(2, 70, 1, 4), "k": draw(2, 70, 1, 4), "v": draw(2, 70, 2, 3)}
    arrays |= {"log_decay": -jnp.abs(draw(2, 70, 2)), "initial_state": draw(2, 2, 4, 3)}

    def loss(arrays):
        out, state = scalar_decay(**arrays, form=form)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(state))

    return loss, arrays, jax.tree.map(lambda x: draw(*x.shape), arrays)


def _dot(x, y):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, x, y)))


def _curvature(form):
    """The gradient of the slope along a direction."""
    with jax.enable_x64(True):
        loss, at, along = _loss(form)
        return jax.jit(jax.grad(lambda x: _dot(jax.grad(loss)(x), along)))(at)


def test_backward_of_chunks_is_differentiable():
    """The backward pass of the chunkwise form is its own; JAX derives the others'."""
    assert_close(_curvature("recurrent"), _curvature("chunkwise"), 1e-11)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("form", ["associative", "parallel", "recurrent"])
def test_forward_mode(form):
    """`jax.jvp` takes the forms that JAX differentiates."""
    with jax.enable_x64(True):
        loss, at, along = _loss(form)
        _, slope = jax.jit(lambda at, along: jax.jvp(loss, (at,), (along,)))(at, along)
        np.testing.assert_allclose(slope, _dot(jax.jit(jax.grad(loss))(at), along), rtol=1e-11)


def test_forward_mode_of_chunks_is_refused():
    with jax.enable_x64(True):
        loss, at, along = _loss("chunkwise")
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(loss, (at,), (along,))
