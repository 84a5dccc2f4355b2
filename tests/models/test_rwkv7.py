"""A language model of RWKV-7 blocks: two layers that look back in a block, and values that go up the stack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effattn_jax.models import LanguageModel, Sampling, generate
from tests.layers.catalogue import agree, decode, filled, jit, random

VOCAB, LAYERS = 23, 3
TOKENS = np.random.default_rng(0).integers(VOCAB, size=(2, 20))
RWKV = {"head_dim": 4, "decay_rank": 2, "rate_rank": 2, "value_rank": 2, "gate_rank": 2}


def make():
    return LanguageModel(
        vocab_size=VOCAB,
        dim=8,
        mlp_dim=32,
        mlp="rwkv7_channel_mix",
        pattern=("rwkv7",),
        repeats=LAYERS,
        mixers={"rwkv7": RWKV},
        rngs=nnx.Rngs(0),
    )


@functools.cache
def model():
    return filled(make)


@functools.cache
def one_pass():
    return jit(lambda model, tokens: model(tokens)[0])(model(), TOKENS)


@pytest.mark.slow
def test_prefill_then_decoding_is_one_pass():
    logits, state = jit(lambda model, tokens, state: model(tokens, state))(
        model(), TOKENS[:, :7], model().init_state(2, 20)
    )
    agree(one_pass()[:, :7], logits)
    agree(one_pass()[:, 7:], decode(model(), TOKENS[:, 7:], state)[0])


@pytest.mark.slow
def test_generation_follows_the_scores():
    """Prompts of different lengths, one padded at the front."""
    prompts, forward = [TOKENS[0, :9], TOKENS[1, :4]], jit(lambda model, tokens: model(tokens)[0])
    new = generate(model(), prompts, max_new_tokens=5, sampling=Sampling(temperature=0))
    for prompt, row in zip(prompts, new, strict=True):
        tokens = np.zeros((1, 20), int)
        tokens[0, : len(prompt) + 5] = np.concatenate([prompt, row])
        best = np.argmax(forward(model(), tokens)[0], axis=-1)
        np.testing.assert_array_equal(row, best[len(prompt) - 1 : len(prompt) + 4])


@jit
def gradient(model, tokens, weights):
    return jax.grad(lambda model: jnp.sum(weights * model(tokens)[0]))(model)


@pytest.mark.slow
def test_values_of_the_first_layer_go_up():
    """Only the layers above the first mix them in."""
    blocks = gradient(model(), TOKENS, random("weights", 2, 20, VOCAB)).units.blocks
    for parameter in jax.tree.leaves(nnx.state(blocks[0].mixer.v_mix)):
        size = np.abs(np.asarray(parameter)).reshape(LAYERS, -1).max(axis=1)
        assert size[0] == 0
        assert size[1:].min() > 1e-6


@pytest.mark.slow
def test_training():
    """From its start, on one batch of random tokens to learn by heart: their entropy is log 23 = 3.1."""
    optimizer = optax.adam(1e-2)

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(TOKENS[:, :-1])[0], TOKENS[:, 1:]).mean()

    def step(carry, _):
        model, moments = carry
        value, gradient = jax.value_and_grad(loss)(model)
        update, moments = optimizer.update(gradient, moments)
        return (jax.tree.map(jnp.add, model, update), moments), value

    fresh = jit(make)()
    _, losses = jit(lambda model: jax.lax.scan(step, (model, optimizer.init(model)), length=100))(fresh)
    assert np.isfinite(losses).all()
    assert abs(losses[0] - np.log(VOCAB)) < 0.1
    assert losses[-1] < 1.0
