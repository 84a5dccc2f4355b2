"""Layers are pytrees of parameters: JAX's transformations and a user's own modules take them as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import RMSNorm
from effattn_jax.layers.buffer import Buffer
from tests.layers.catalogue import BATCH, DIM, EVERY, RECORDS, agree, filled, forward, inputs, jit, layer, random, step

LENGTH, CAPACITY = 5, 140


def leaves(module):
    return jax.tree.leaves(nnx.state(module))


@EVERY
def test_a_pass_changes_nothing_in_the_module(name):
    """Inside one trace, where a change would be seen (outside it would be lost)."""

    def call(module, x, state):
        graph, before = nnx.graphdef(module), leaves(module)
        module(x)
        _, state = module(x, state)
        module(x[:, :1], state)
        assert nnx.graphdef(module) == graph
        assert all(a is b for a, b in zip(before, leaves(module), strict=True))

    jax.eval_shape(call, layer(name), inputs(LENGTH), layer(name).init_state(BATCH, 2 * LENGTH))


@jit
def parameter_gradients(module, x, weights):
    loss = lambda module: jnp.sum(weights * module(x)[0])  # noqa: E731
    checkpointed = lambda module: jnp.sum(weights * jax.checkpoint(lambda m, x: m(x)[0])(module, x))  # noqa: E731
    return jax.grad(loss)(module), jax.grad(checkpointed)(module)


@pytest.mark.quick_cases(1)
@EVERY
def test_gradients_reach_every_parameter(name):
    """With respect to the module as it is; the same ones with recomputation."""
    gradient, recomputed = parameter_gradients(layer(name), inputs(LENGTH), random("weights", BATCH, LENGTH, DIM))
    assert type(gradient) is type(layer(name))
    for path, variable in nnx.to_flat_state(nnx.state(gradient, nnx.Param)):
        if isinstance(variable, Buffer) or ".".join(map(str, path)).startswith(RECORDS[name].idle):
            continue
        size = np.abs(np.asarray(variable[...]))
        assert np.isfinite(size).all(), path
        assert size.max() > 1e-6, path
    for a, b in zip(leaves(gradient), leaves(recomputed), strict=True):
        agree(a, b, limit=1e-6)


@pytest.mark.quick_cases(2)
@EVERY
def test_gradient_is_the_slope(name):
    """Along a random direction of all parameters, by central differences whose error is of fourth order."""
    module, x, weights = layer(name), inputs(LENGTH), random("weights", BATCH, LENGTH, DIM)
    gradient, _ = parameter_gradients(module, x, weights)
    buffers = {path for path, _ in nnx.to_flat_state(nnx.state(module, Buffer))}
    graph, state = nnx.split(module)
    drawn = [
        (path, v.replace(jnp.zeros(v.shape) if path in buffers else jnp.asarray(random(str(v.shape), *v.shape))))
        for path, v in nnx.to_flat_state(state)
    ]
    direction = nnx.merge(graph, nnx.from_flat_state(drawn))
    slope = sum(float(jnp.vdot(d, g)) for d, g in zip(leaves(direction), leaves(gradient), strict=True))

    def difference(size):
        ends = []
        for sign in (1, -1):
            moved = jax.tree.map(lambda p, d, sign=sign: p + sign * size * d, module, direction)
            ends.append(np.sum(weights * np.asarray(forward(moved, x), np.float64)))
        return (ends[0] - ends[1]) / (2 * size)

    np.testing.assert_allclose((4 * difference(5e-4) - difference(1e-3)) / 3, slope, rtol=5e-3)


@EVERY
def test_vmap_over_inputs_and_states(name):
    x = np.stack([inputs(LENGTH), random("other", BATCH, LENGTH, DIM)])
    state = layer(name).init_state(BATCH, CAPACITY)
    states = jax.tree.map(lambda a: jnp.stack([a, a]), state)
    mapped = jit(jax.vmap(lambda module, x, state: module(x, state), in_axes=(None, 0, 0)))
    _, states = mapped(layer(name), x, states)
    y, _ = mapped(layer(name), x, states)
    for i in range(2):
        _, end = step(layer(name), x[i], state)
        agree(step(layer(name), x[i], end)[0], y[i])


@pytest.mark.quick_cases(5)
@EVERY
def test_parameters_name_their_axes(name):
    for path, variable in nnx.to_flat_state(nnx.state(layer(name), nnx.Param)):
        axes = variable.get_metadata()["axes"]
        assert len(axes) == variable.ndim, path
        assert all(isinstance(axis, str) for axis in axes), path


class Residual(nnx.Module):
    """What a user writes."""

    def __init__(self, record, rngs):
        self.norm = RMSNorm(DIM)
        self.mixers = nnx.List([record.layer(DIM, **record.options, rngs=rngs) for _ in range(2)])

    def __call__(self, x, states=(None, None)):
        new = []
        for mixer, state in zip(self.mixers, states, strict=True):
            y, state = mixer(self.norm(x), state)
            x = x + y
            new.append(state)
        return x, tuple(new)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", ["mamba2_groups", "attention_window_sinks"])
def test_inside_a_module_of_the_user(name):
    model = filled(lambda: Residual(RECORDS[name], nnx.Rngs(0)))
    x = inputs(LENGTH)
    states = tuple(mixer.init_state(BATCH, LENGTH) for mixer in model.mixers)
    _, states = step(model, x[:, :3], states)
    last, _ = step(model, x[:, 3:], states)
    agree(np.asarray(forward(model, x))[:, 3:], last)
