"""Test-time training against printed goldens, a public implementation, and what it reduces to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear import delta_rule, scalar_decay, ttt_linear, ttt_mlp
from effattn_jax.linear.inner_loss import Affine, InnerNorm, activations, gelu, gelu_slope, loss_gradients
from effattn_jax.linear.ttt import FORMS
from effattn_jax.linear.ttt_forms import Learner, Tokens, aligned, chunkwise, descend, recurrent
from tests.compiled import jit
from tests.linear import fixture
from tests.linear.det import det, heads
from tests.linear.records.ttt import RECORDS
from tests.linear.suite import Sizes, draw_problem
from tests.ratio import FLOAT32, assert_close

every_form = pytest.mark.parametrize("form", FORMS)
every_engine = pytest.mark.parametrize("engine", RECORDS, ids=lambda engine: engine.name)
ENGINES = {"ttt_linear": ttt_linear, "ttt_mlp": ttt_mlp}

sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731


def golden(engine, *weights, form):
    """One head of four channels, eight tokens in mini-batches of four, in float64."""
    with jax.enable_x64(True):
        out, state = jit(engine, static_argnames="form")(
            *(heads(det(s, (8, 4))) for s in (1, 2, 3)),
            sigmoid(det(6, (1, 8, 1))) / 4,
            np.maximum(1 / np.arange(1, 5) + 0.05 * det(7, (4,)), 0),
            *(x[None] for x in weights),
            1 + 0.1 * det(8, (1, 4)),
            0.1 * det(9, (1, 4)),
            form=form,
        )
        return np.asarray(out)[0, :, 0], jax.tree.map(np.asarray, state)


def assert_printed(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=5.1e-7)


@every_form
def test_golden_linear(form):
    out, state = golden(ttt_linear, 0.3 * det(10, (4, 4)), 0.1 * det(11, (4,)), form=form)
    assert_printed([out.sum(), *out[-1, :3]], [-0.148096, 1.732776, 0.422076, -0.292224])
    assert_printed([state.weights[0].W.sum(), state.weights[0].b.sum()], [-0.398187, 0.216676])
    assert state.place == 0
    assert not any(x.any() for x in jax.tree.leaves(state.gathered))


@every_form
def test_golden_mlp(form):
    weights = (0.3 * det(10, (4, 8)), 0.1 * det(11, (8,)), 0.3 * det(12, (8, 4)), 0.1 * det(13, (4,)))
    out, state = golden(ttt_mlp, *weights, form=form)
    assert_printed([out.sum(), *out[-1, :3]], [-0.855062, -1.645226, 0.180883, 1.516065])
    assert_printed([layer.W.sum() for layer in state.weights], [-0.230638, 0.328642])


@pytest.mark.parametrize(
    ("op", "case", "form"),
    [
        pytest.param(op, case, form, marks=() if (case, form) == ("T37", "chunkwise") else pytest.mark.slow)
        for op in ENGINES
        for case in fixture.load(op)
        for form in FORMS
    ],
)
@pytest.mark.quick_cases(1)
def test_fixture(op, case, form):
    """Gradients with respect to all arguments. The final weights there are those that the last token reads."""

    def function(x):
        weights = [x[name] if name[0] == "W" else x[name][:, 0] for name in ("W1", "b1", "W2", "b2") if name in x]
        tokens = (x[name] for name in ("q", "k", "v", "lr", "token_idx"))
        out, state = ENGINES[op](*tokens, *weights, x["ln_w"], x["ln_b"], form=form)
        last = descend(state.weights, state.gathered, x["token_idx"][state.place - 1])
        layers = {f"W{i}_T": layer.W for i, layer in enumerate(last, 1)}
        return {"o": out} | layers | {f"b{i}_T": layer.b[:, :, None] for i, layer in enumerate(last, 1)}

    fixture.assert_matches(function, fixture.load(op)[case])


@every_engine
@every_form
@pytest.mark.quick_cases(1)
def test_no_learning_is_a_fixed_network(engine, form):
    """lr = 0: o = q + LN(f(q)) with the weights a document starts from."""
    x = draw_problem(engine, Sizes(37, 8)).inputs
    out, _ = jit(engine.function, static_argnames="form")(**x | {"lr": 0 * x["lr"]}, form=form)
    network = engine.fresh(x).weights
    y = np.moveaxis(x["q"], 2, 1)
    for i, layer in enumerate(network):
        y = (np.asarray(gelu(y)) if i else y) @ layer.W + layer.b[:, None]
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    want = x["q"] + np.moveaxis(x["ln_scale"][:, None] * y + x["ln_bias"][:, None], 1, 2)
    assert_close(want, out, FLOAT32)


@every_engine
@pytest.mark.slow
def test_gradient_by_hand_is_that_of_the_loss(engine):
    """Of the weights of every layer, each token having its own."""
    with jax.enable_x64(True):
        x = {name: jnp.asarray(x, jnp.float64) for name, x in draw_problem(engine, Sizes(3, 5, batch=1)).inputs.items()}
        norm = InnerNorm(x["ln_scale"], x["ln_bias"])
        k, v = (jnp.moveaxis(x[name], 1, 2) for name in "kv")
        network = jax.tree.map(jnp.asarray, engine.fresh(x).weights)

        def losses(network):
            z = activations(network, k)[1][-1]
            return 0.5 * jnp.sum(jnp.square(norm(z) - (v - k)), axis=(0, 1, 3))

        want = jax.jacobian(losses)(network)
        for layer, gradient in zip(want, loss_gradients(network, norm, k, v), strict=True):
            assert_close(layer.W, jnp.einsum("bhti,bhto->thio", gradient.x, gradient.G), 1e-12)
            assert_close(layer.b, jnp.moveaxis(gradient.G[0], 1, 0), 1e-12)


def test_slope_of_gelu():
    x = jnp.linspace(-4, 4, 41)
    np.testing.assert_allclose(gelu_slope(jnp.float32(0.5)), 0.8673699, atol=1e-7)
    np.testing.assert_allclose(gelu_slope(x), jax.vmap(jax.grad(gelu))(x), atol=1e-6)


@every_engine
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
@pytest.mark.quick_cases(1)
def test_decoding_goes_on_where_the_prefill_ended(engine, length):
    """From no state, where rows are aligned with mini-batches, token by token over the end of the next one."""
    x = draw_problem(engine, Sizes(52, 8, batch=1)).inputs
    call = jit(engine.function)
    want, want_state = call(**x)
    tokens = lambda *where: {name: engine.take(name, a, tokens=slice(*where)) for name, a in x.items()}  # noqa: E731
    out, state = call(**tokens(length))
    outs = [out]
    for t in range(length, 52):
        out, state = call(**tokens(t, t + 1), initial_state=state)
        outs.append(out)
    assert_close((want, want_state), (np.concatenate(outs, 1), state), FLOAT32)


class Identity(NamedTuple):
    """No layer norm: the loss is 1/2 |z - target|^2."""

    def __call__(self, z):
        return z

    def loss_gradient(self, z, target):
        return z - target


def _plain(form, x, token_scale):
    """TTT-Linear from zero weights, without layer norm, query in the output or key in the target."""
    dim = x["q"].shape[-1]
    learner = Learner((Affine(jnp.zeros((2, dim, dim)), jnp.zeros((2, dim))),), Identity(), jnp.asarray(token_scale))
    tokens = Tokens(x["q"], x["k"], x["v"] + x["k"], x["lr"])
    run = {"recurrent": recurrent, "aligned": lambda t, le, *_: aligned(t, le), "chunkwise": chunkwise}[form]
    return jit(lambda tokens, learner: run(tokens, learner, None, None))(tokens, learner)[0] - x["q"]


def _with_bias(x):
    """A bias is one more channel of ones in queries and keys."""
    return (np.concatenate([x[name], np.ones_like(x[name][..., :1])], -1) for name in "qk")


@pytest.mark.parametrize("form", ["recurrent", "aligned", "chunkwise"])
@pytest.mark.slow
def test_mini_batches_of_one_are_the_delta_rule(form):
    x = draw_problem(RECORDS[0], Sizes(37, 8, heads=(2, 2, 2))).inputs
    q, k = _with_bias(x)
    want, _ = delta_rule(q, k, x["v"], x["lr"], scale=1.0)
    assert_close(want, _plain(form, x, [1.0]), FLOAT32)


@pytest.mark.parametrize("form", ["recurrent", "aligned", "chunkwise"])
@pytest.mark.quick_cases(1)
def test_one_mini_batch_is_linear_attention(form):
    """The gradient at weights of zero is -v for every token."""
    x = draw_problem(RECORDS[0], Sizes(37, 8, heads=(2, 2, 2))).inputs
    x["lr"] = np.full_like(x["lr"], 0.3)
    q, k = _with_bias(x)
    want, _ = scalar_decay(q, k, x["v"], scale=0.3)
    assert_close(want, _plain(form, x, np.ones(37, np.float32)), FLOAT32)
