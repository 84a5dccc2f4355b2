"""Every mixer by its name in a config: it trains on packed rows, prefills and decodes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.mixer import get_config
from effattn_jax.layers import MIXERS
from effattn_jax.models.blueprint import blueprint, parameters_of
from effattn_jax.training.setup import model_maker
from effattn_jax.training.step import loss_sum
from tests.layers.catalogue import jit

EVERY = pytest.mark.parametrize("name", sorted(MIXERS))
VOCABULARY, LENGTH = 258, 48


def maker(name, **fields):
    config = get_config(name)
    config.model.update(fields)
    return model_maker(config, VOCABULARY)


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (2, LENGTH + 1))
    ids = np.stack([np.repeat([0, 1, -1], [20, 25, 3]), np.repeat([0, 1, 2], [1, 40, 7])]).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (20, 25, 3, 1, 40, 7)]).reshape(2, LENGTH)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ids, "positions": positions}


@EVERY
@pytest.mark.quick_cases(2)
def test_a_config_names_it(name):
    """Gradients of a packed batch, a prefill and a decoding step are traced; the size is about the quickstart's."""
    plan = blueprint(maker(name))
    assert 0.7e6 < sum(np.prod(x.shape) for x in plan.shapes.values()) < 4e6
    gradient = jax.value_and_grad(functools.partial(loss_sum, plan), has_aux=True)
    _, gradients = jax.eval_shape(gradient, plan.shapes, batch())
    assert gradients.keys() == plan.shapes.keys()

    def generation(parameters):
        model = plan.model(parameters)
        state = model.init_state(2, LENGTH)
        _, state = model(batch()["inputs"][:, :9], state)
        return model(batch()["inputs"][:, 9:10], state)

    logits, _ = jax.eval_shape(generation, plan.shapes)
    assert logits.shape == (2, 1, VOCABULARY)


@EVERY
@pytest.mark.slow
def test_it_learns_a_batch(name):
    """Two layers of it in a stack."""
    make = maker(name, dim=160, repeats=2)
    plan = blueprint(make)
    optimizer = optax.adam(3e-3)

    @jit
    def start():
        parameters = parameters_of(make())
        return parameters, optimizer.init(parameters)

    @jit
    def step(parameters, moments):
        (nats, tokens), gradients = jax.value_and_grad(functools.partial(loss_sum, plan), has_aux=True)(
            parameters, batch()
        )
        updates, moments = optimizer.update(jax.tree.map(lambda g: g / tokens, gradients), moments)
        return optax.apply_updates(parameters, updates), moments, nats / tokens

    parameters, moments = start()
    losses = []
    for _ in range(12):
        parameters, moments, loss = step(parameters, moments)
        losses.append(float(loss))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(bool(jnp.isfinite(x).all()) for x in parameters.values())
