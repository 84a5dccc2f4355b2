"""The memory of Titans against printed goldens, float64 references, autodiff, and the mechanisms it contains."""

import functools
import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear import TitansState, delta_rule, dplr, scalar_decay, titans_memory
from effattn_jax.linear.inner_loss import InnerNorm
from effattn_jax.linear.memory_network import Loss, loss_gradients, matrices, read
from effattn_jax.linear.titans_memory import FORMS
from tests.compiled import jit
from tests.linear import fixture
from tests.linear.det import det, heads
from tests.linear.draw import unit
from tests.ratio import FLOAT32, assert_close

T, K, V = 8, 4, 3
every_form = pytest.mark.parametrize("form", FORMS)
run = jit(titans_memory, static_argnames=("chunk", "loss_scale", "activation", "form"))


@every_form
def test_golden_linear_memory(form):
    gate = lambda x: x[None, :, None]  # noqa: E731
    q, k, v = unit(det(1, (T, K))), unit(det(2, (T, K))), det(3, (T, V))
    theta, eta, alpha = 0.2 + 0.1 * det(29, (T,)), 0.6 + 0.3 * det(30, (T,)), 0.1 + 0.05 * det(31, (T,))
    gates = [gate(x) for x in (theta, eta, alpha)]
    with jax.enable_x64(True):
        out, state = run(heads(q), heads(k), heads(v), *gates, (np.zeros((1, K, V)),), chunk=4, form=form)
        out, state = jax.tree.map(np.asarray, (out, state))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=5.1e-7)
    close(out.sum(), -2.966336)
    close(out[0, -1, 0], [-1.589892, -1.202661, -0.381625])
    (M,), (S,) = state.memory, state.momentum
    close([M.sum(), M[0, 0, 0, 0], S.sum()], [-3.436275, 0.128638, -1.744374])


def _cases(op):
    return pytest.mark.parametrize(
        ("case", "form"),
        [
            pytest.param(case, form, marks=() if case == "T65" and form == "chunkwise" else pytest.mark.slow)
            for case in fixture.load(op)
            for form in FORMS
        ],
    )


def _from(h0):
    """The state of a linear memory at the start of a chunk."""
    return TitansState((h0,), (jnp.zeros_like(h0),), (h0,), jnp.zeros(len(h0), jnp.int32))


@pytest.mark.slow
@_cases("titans_plain")
def test_fixture_plain(form, case):
    """A gradient per token of 1/2 |k M - v|^2, linear memory."""

    def function(x):
        weights = jnp.zeros((x["q"].shape[2], x["q"].shape[3], x["v"].shape[3]), x["q"].dtype)
        state = _from(x["h0"]) if "h0" in x else None
        gates = (x["theta"], x["eta"], x["alpha"])
        out, state = titans_memory(
            x["q"], x["k"], x["v"], *gates, (weights,), chunk=1, loss_scale=1.0, initial_state=state, form=form
        )
        return {"o": out, "ht": state.memory[0], "st": state.momentum[0]}

    fixture.assert_matches(function, fixture.load("titans_plain")[case])


@_cases("titans_linear")
@pytest.mark.slow
def test_fixture_with_norm(form, case):
    """1/2 |LN(k M) - (v - k)|^2 in chunks of 16."""

    def function(x):
        weights = jnp.zeros((x["q"].shape[2], x["q"].shape[3], x["v"].shape[3]), x["q"].dtype)
        gates = (x["theta"], x["eta"], x["alpha"])
        out, state = titans_memory(
            x["q"],
            x["k"],
            x["v"],
            *gates,
            (weights,),
            loss_scale=1.0,
            norm=(x["w"], x["b"]),
            initial_state=_from(x["h0"]) if "h0" in x else None,
            form=form,
        )
        return {"o": out, "ht": state.memory[0], "st": state.momentum[0]}

    fixture.assert_matches(function, fixture.load("titans_linear")[case])


def _draw(length=21, batch=2, count=2, key_dim=6, value_dim=5, seed=0):
    """float64: q, unit keys, v and gates."""
    rng = np.random.default_rng(seed)
    randn = lambda *shape: rng.standard_normal((batch, length, count, *shape))  # noqa: E731
    gate = lambda: 1 / (1 + np.exp(randn()))  # noqa: E731
    return randn(key_dim), unit(randn(key_dim)), randn(value_dim), 0.3 * gate(), gate(), gate()


def _weights(*dims, count=2, seed=1):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((count, i, o)) * i**-0.5 for i, o in pairwise(dims))


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.slow
def test_gradients_are_those_of_autodiff(activation, normed):
    """Of the summed loss, for every matrix of a network of three layers."""
    with jax.enable_x64(True):
        q, k, _, theta, _, _ = _draw()
        k, v, theta = (jnp.asarray(np.moveaxis(x, 1, 2)) for x in (k, q, theta))
        norm = InnerNorm(jnp.asarray(1 + 0.1 * det(1, (2, 6))), jnp.asarray(det(2, (2, 6)))) if normed else None
        loss = Loss(activation, 2.0, norm)
        weights = tuple(jnp.asarray(w) for w in _weights(6, 9, 7, 6))

        def total(weights):
            z = read(matrices(weights), k, activation)
            error = z - v if norm is None else norm(z) - (v - k)
            return jnp.sum(theta[..., None] * error**2)

        got = tuple(g.total(theta).sum(0) for g in loss_gradients(weights, loss, k, v))
        assert_close(jax.grad(total)(weights), got, 1e-13)


@every_form
@pytest.mark.quick_cases(1)
def test_token_by_token_without_momentum_is_dplr(form):
    """The error is measured on the memory before its decay: a = -k, b = c theta k, v = c theta v, g = ln(1 - alpha)."""
    with jax.enable_x64(True):
        q, k, v, theta, eta, alpha = _draw()
        out, state = run(q, k, v, theta, 0 * eta, alpha, (np.zeros((2, 6, 5)),), chunk=1, loss_scale=3.0, form=form)
        step = 3.0 * theta[..., None]
        want, memory = dplr(q, k, step * v, -k, step * k, np.log1p(-alpha), scale=1.0, form="recurrent")
        assert_close((want, memory), (out, state.memory[0]), 1e-12)


@pytest.mark.quick_cases(1)
@every_form
def test_token_by_token_without_momentum_and_decay_is_the_delta_rule(form):
    """Test-time training of a linear map without norm and residual, a token a mini-batch."""
    with jax.enable_x64(True):
        q, k, v, theta, eta, alpha = _draw()
        weights = _weights(6, 5)
        out, state = run(q, k, v, theta, 0 * eta, 0 * alpha, weights, chunk=1, loss_scale=1.0, form=form)
        start = np.broadcast_to(weights[0], (2, 2, 6, 5))
        want, memory = delta_rule(q, k, v, theta, scale=1.0, initial_state=start, form="recurrent")
        assert_close((want, memory), (out, state.memory[0]), 1e-12)


@every_form
@pytest.mark.quick_cases(1)
def test_one_chunk_from_zero_is_linear_attention(form):
    """The first gradient is -2 theta v for every token."""
    with jax.enable_x64(True):
        q, k, v, theta, eta, alpha = _draw()
        out, state = run(q, k, v, theta, 0 * eta, 0 * alpha, (np.zeros((2, 6, 5)),), chunk=21, form=form)
        want, memory = scalar_decay(q, k, 2 * theta[..., None] * v, scale=1.0, form="recurrent")
        assert_close((want, memory), (out, state.memory[0]), 1e-12)


@every_form
@pytest.mark.quick_cases(1)
def test_one_chunk_is_one_shot(form):
    """Every token's weights by two plain loops over gradients of autodiff at the learned start."""
    with jax.enable_x64(True):
        q, k, v, theta, eta, alpha = _draw(length=7, batch=1, count=1)
        weights = _weights(6, 8, 5, count=1)
        out, state = run(q, k, v, theta, eta, alpha, weights, chunk=7, form=form)
        network = lambda w, x: jax.nn.gelu(x @ w[0]) @ w[1]  # noqa: E731
        gradient = jax.grad(lambda w, k, v: jnp.sum((network(w, k) - v) ** 2))
        M0 = [jnp.asarray(w[0]) for w in weights]
        M, S = M0, [0 * w for w in M0]
        for t in range(7):
            q_t, k_t, v_t, theta_t, eta_t, alpha_t = (x[0, t, 0] for x in (q, k, v, theta, eta, alpha))
            S = [eta_t * s - theta_t * g for s, g in zip(S, gradient(M0, k_t, v_t), strict=True)]
            M = [(1 - alpha_t) * m + s for m, s in zip(M, S, strict=True)]
            assert_close(network(M, q_t), out[0, t, 0], 1e-12)
        assert_close((M, S), ([w[0, 0] for w in state.memory], [w[0, 0] for w in state.momentum]), 1e-12)


@pytest.mark.parametrize("form", ["chunkwise", pytest.param("associative", marks=pytest.mark.slow)])
@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 2, 4])
@pytest.mark.quick_cases(1)
def test_chunks_of_any_size(form, chunk):
    with jax.enable_x64(True):
        arguments = (*_draw(), _weights(6, 8, 5))
        want = run(*arguments, chunk=chunk, form="recurrent")
        assert_close(want, run(*arguments, chunk=chunk, form=form), 1e-12)
        assert not np.allclose(want[0], run(*arguments, chunk=8, form="recurrent")[0], rtol=1e-4)


@every_form
@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.slow
def test_gates_of_exactly_0_and_1(form, chunk):
    """Values and gradients, against the equation."""
    with jax.enable_x64(True):
        q, k, v, theta, eta, alpha = _draw()
        rng = np.random.default_rng(3)
        eta, alpha = (np.where(rng.random(x.shape) < 0.6, rng.integers(0, 2, x.shape), x) for x in (eta, alpha))
        theta = np.where(rng.random(theta.shape) < 0.2, 0, 0.3 * theta)
        weights = _weights(6, 5)

        def loss(gates, form):
            out, state = titans_memory(q, k, v, *gates, weights, chunk=chunk, form=form)
            return jnp.sum(out * v) + jnp.sum(state.memory[0] ** 2) + jnp.sum(state.momentum[0] ** 2)

        gradient = jit(jax.value_and_grad(loss), static_argnums=1)
        assert_close(gradient((theta, eta, alpha), "recurrent"), gradient((theta, eta, alpha), form), 1e-12)
        # one slope against the difference of two values
        t, size = (0, 4, 0), 1e-6
        ends = [loss((theta, eta + x * (np.indices(eta.shape) == np.reshape(t, (3, 1, 1, 1))).all(0), alpha), form)
                for x in (size, -size)]  # fmt: skip
        slope = gradient((theta, eta, alpha), form)[1][1][t]
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * size), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("prefill", [1, 15, 16, 17])
@pytest.mark.quick_cases(1)
def test_decoding_from_anywhere_in_a_chunk(prefill):
    with jax.enable_x64(True):
        arguments, weights = _draw(length=35), _weights(6, 8, 5)
        want, end = run(*arguments, weights)
        out, state = run(*(x[:, :prefill] for x in arguments), weights)
        outs = [out]
        for t in range(prefill, 35):
            out, state = run(*(x[:, t : t + 1] for x in arguments), weights, initial_state=state)
            outs.append(out)
        assert_close((want, end), (jnp.concatenate(outs, 1), state), 1e-12)
        assert state.place.tolist() == [3, 3]


def test_the_momentum_carries_over_chunks():
    """eta = 1 and no further steps: the memory moves on."""
    with jax.enable_x64(True):
        q, k, v, theta, eta, alpha = _draw()
        theta = np.where(np.arange(21)[:, None] < 4, theta, 0)
        _, state = run(q, k, v, theta, 0 * eta + 1, 0 * alpha, (np.zeros((2, 6, 5)),), chunk=4)
        push = np.einsum("bthk,bthv->bhkv", k[:, :4], 2 * theta[:, :4, :, None] * v[:, :4])
        assert_close(push, state.momentum[0], FLOAT32)


WRONG = {
    "chunk": {"chunk": 0},
    "activation": {"activation": "relu"},
    "weights": {"weights": ()},
    "weights[0]": {"weights": (np.zeros((6, 5)),)},
    "weights[1]": {"weights": (np.zeros((2, 6, 8)), np.zeros((2, 7, 5)))},
    "norm": {"norm": (np.zeros((2, 5)), np.zeros((2, 5)))},
    "v": {"weights": (np.zeros((2, 6, 4)),)},
    "q": {"weights": (np.zeros((3, 6, 5)),)},
    "initial_state.momentum": {
        "initial_state": TitansState((np.zeros((2, 2, 6, 5)),), (), (np.zeros((2, 2, 6, 5)),), np.zeros(2, np.int32))
    },
    "initial_state.place": {"initial_state": TitansState(*((np.zeros((2, 2, 6, 5)),),) * 3, np.zeros(2))},
}


@pytest.mark.parametrize("argument", WRONG)
def test_bad_arguments(argument):
    names = ("q", "k", "v", "theta", "eta", "alpha", "weights")
    arguments = dict(zip(names, (*_draw(), _weights(6, 5)), strict=True)) | WRONG[argument]
    with pytest.raises(ValueError, match=rf"^{re.escape(argument)}: got .+; needs .+") as error:
        titans_memory(**arguments)
    assert "\n" not in str(error.value)
