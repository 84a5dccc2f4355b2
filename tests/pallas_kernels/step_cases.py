"""What the tests of steps have in common: arguments of every kind, and the equation in float32 to hold them against."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax.linear import scalar_decay, vector_decay
from tests.linear.draw import log_decays
from tests.ratio import BFLOAT16_GATE, BFLOAT16_GRAD, BFLOAT16_OUT, FLOAT32, assert_close

KINDS = ("scalar", "vector", "bonus")
SCALE = 0.3


def draw(kind="vector", key_dim=64, value_dim=64, heads=(2, 2, 2), strength="mild", dtype=jnp.float32, batch=2):
    """Arguments by name, as the engines have them, and what out and the state are multiplied with in the loss."""
    rng = np.random.default_rng(0)
    randn = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    most = max(heads)
    dims = (key_dim, key_dim, value_dim)
    inputs = {
        name: jnp.asarray(randn(batch, 1, h, dim), dtype) for name, h, dim in zip("qkv", heads, dims, strict=True)
    }
    channels = () if kind == "scalar" else (key_dim,)
    inputs["log_decay"] = log_decays(rng, (batch, 1, most, *channels), strength)
    inputs["initial_state"] = randn(batch, most, key_dim, value_dim)
    if kind == "bonus":
        inputs["bonus"] = randn(most, key_dim)
    return inputs, (randn(batch, 1, most, value_dim), randn(batch, most, key_dim, value_dim))


def engine_of(inputs):
    return scalar_decay if inputs["log_decay"].ndim == 3 else vector_decay


def loss_and_gradients(function, inputs, weights):
    def loss(inputs):
        out, state = function(**inputs)
        return jnp.sum(out.astype(jnp.float32) * weights[0]) + jnp.sum(state * weights[1]), (out, state)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    return outputs, gradients


def check(step, drawn, segment_ids=None, **options):
    """Out, state and gradients of a kernel are those of the recurrence."""
    inputs, weights = drawn
    exact = {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}
    oracle = functools.partial(engine_of(inputs), form="recurrent", implementation="xla")
    common = {"segment_ids": segment_ids, "scale": SCALE}
    want, want_gradients = loss_and_gradients(functools.partial(oracle, **common), exact, weights)
    got, gradients = loss_and_gradients(functools.partial(step, **common, **options), inputs, weights)
    rounded = inputs["q"].dtype != jnp.float32
    assert got[0].dtype == inputs["q"].dtype
    assert_close(want[0], got[0], BFLOAT16_OUT if rounded else FLOAT32, "out")
    assert_close(want[1], got[1], FLOAT32, "state")
    for name, x in gradients.items():
        assert x.dtype == inputs[name].dtype
        limit = BFLOAT16_GATE if name in ("log_decay", "bonus") else BFLOAT16_GRAD
        assert_close(want_gradients[name], x, limit if rounded else FLOAT32, f"d{name}")
    return got, gradients


def check_padding(step, kind, **options):
    """The state passes, nothing else matters, not even what is no number."""
    inputs, weights = draw(kind, batch=3)
    ids = np.asarray([[0], [-1], [4]], np.int32)
    (out, state), gradients = check(step, (inputs, weights), ids, **options)
    assert not np.asarray(out)[1].any()
    np.testing.assert_array_equal(state[1], inputs["initial_state"][1])
    assert not any(np.asarray(gradients[name])[1].any() for name in ("q", "k", "v", "log_decay"))
    holes = {name: jnp.asarray(inputs[name]).at[1].set(jnp.nan) for name in ("q", "k", "v", "log_decay")}
    again = step(**inputs | holes, segment_ids=ids, scale=SCALE, **options)
    jax.tree.map(np.testing.assert_array_equal, (out, state), again)


def check_is_one_pass(kind, name):
    """Four steps by name, one after the other, are one chunkwise pass; None never takes a kernel on a CPU."""
    drawn = [draw(kind, batch=1)[0] | {"initial_state": None} for _ in range(4)]
    rng = np.random.default_rng(1)
    for inputs in drawn:
        inputs |= {x: jnp.asarray(rng.standard_normal(inputs[x].shape), jnp.float32) for x in "qkv"}
    engine, outs, state = engine_of(drawn[0]), [], None
    for inputs in drawn:
        out, state = engine(**inputs | {"initial_state": state}, implementation=name)
        outs.append(out)
    row = drawn[0] | {x: np.concatenate([inputs[x] for inputs in drawn], 1) for x in ("q", "k", "v", "log_decay")}
    assert_close(engine(**row, form="chunkwise", implementation="xla"), (np.concatenate(outs, 1), state), FLOAT32)
    traced = lambda implementation: str(  # noqa: E731
        jax.make_jaxpr(lambda: engine(**drawn[0], implementation=implementation))()
    )
    assert "custom_vjp" in traced(name)
    assert "custom_vjp" not in traced(None)
