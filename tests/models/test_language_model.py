"""The stack of repetitions, states, documents, recomputation, precision, errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.models import token_losses
from effattn_jax.models.blueprint import parameters_of
from tests.layers.catalogue import agree, decode_documents, jit, random
from tests.models.tiny import PATTERN, REPEATS, VOCAB, equations, hybrid, make

LENGTH = 12
TOKENS = np.random.default_rng(0).integers(VOCAB, size=(2, LENGTH))
IDS = np.int32([[0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3], [-1, -1, 4, 4, 4, 4, 4, 4, 4, 6, 6, -1]])
apply = jit(lambda model, tokens, ids: model(tokens, segment_ids=ids)[0])
call = jit(lambda model, tokens, state: model(tokens, state))


@jit
def unrolled(model, tokens, ids):
    """The same blocks, taken out of the stack, one after the other."""
    x = model.embedding[...][tokens]
    graph, parameters = nnx.split(model.units)
    for i in range(REPEATS):
        unit = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], parameters))
        for block in unit.blocks:
            y, _ = block.mixer(block.norm(x), segment_ids=ids)
            x = x + y
            x = x + block.mlp(block.mlp_norm(x))
    x = model.final_norm(x)
    return x @ (model.embedding[...].T if model.head is None else model.head.kernel[...])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.quick_cases(1)
def test_scan_is_the_blocks_in_order(tied):
    model = hybrid(tie_embeddings=tied)
    assert (model.head is None) == tied
    agree(unrolled(model, TOKENS, IDS), apply(model, TOKENS, IDS))


def test_without_feed_forward_layers():
    model = hybrid(mlp_dim=0, pattern=("mamba2",))
    assert not any("mlp" in name for name in parameters_of(model))
    x = model.embedding[...][TOKENS]
    graph, parameters = nnx.split(model.units)
    for i in range(REPEATS):
        block = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], parameters)).blocks[0]
        x = x + jit(lambda block, x: block.mixer(block.norm(x))[0])(block, x)
    agree(model.final_norm(x), jit(lambda model, tokens: model.hidden(tokens)[0])(model, TOKENS))


@pytest.mark.slow
def test_the_program_does_not_grow_with_depth():
    def size(repeats):
        model = hybrid(repeats=repeats)
        loss = lambda model: jnp.sum(model(TOKENS, segment_ids=IDS)[0])  # noqa: E731
        return len(equations(jax.make_jaxpr(jax.grad(loss))(model).jaxpr))

    assert size(2) == size(6) > 500


def test_prefill_and_decoding_are_one_pass():
    model = hybrid()
    want = np.asarray(apply(model, TOKENS, np.zeros_like(IDS)))
    state = model.init_state(2, LENGTH)
    first, state = call(model, TOKENS[:, :5], state)
    second, state = call(model, TOKENS[:, 5:10], state)
    third, state = call(model, TOKENS[:, 10:11], state)
    fourth, _ = call(model, TOKENS[:, 11:], state)
    agree(want, np.concatenate([first, second, third, fourth], axis=1))


def test_packed_row_token_by_token_is_one_pass():
    model = hybrid()
    want = np.asarray(apply(model, TOKENS, IDS))
    logits, _ = decode_documents(model, TOKENS, model.init_state(2, LENGTH), IDS)
    agree(want[IDS >= 0], np.asarray(logits)[IDS >= 0])


@jit
def losses_and_gradients(model):
    def loss(model):
        hidden, _ = model.hidden(TOKENS, segment_ids=IDS)
        return jnp.sum(random("weights", 2, LENGTH) * token_losses(hidden, model.head_weights(), TOKENS))

    return jax.value_and_grad(loss)(model)


@pytest.mark.slow
def test_recomputation_changes_nothing():
    loss, gradient = losses_and_gradients(hybrid(pattern=("mamba2", "local")))
    loss_remat, gradient_remat = losses_and_gradients(hybrid(pattern=("mamba2", "local"), remat=True))
    np.testing.assert_allclose(loss, loss_remat, rtol=1e-6)
    want, got = parameters_of(gradient), parameters_of(gradient_remat)
    assert want.keys() == got.keys()
    for name in want:
        agree(want[name], got[name], name, limit=1e-5)
        assert np.abs(want[name]).max() > 0, name


@pytest.mark.slow
def test_recomputation_keeps_less():
    """Of the blocks' feed-forward layers the backward scan gets no hidden activations [repeats, B, T, mlp]."""

    def stacked(model):
        jaxpr = jax.make_jaxpr(jax.grad(lambda model: jnp.sum(model.hidden(TOKENS)[0])))(model).jaxpr
        shapes = [v.aval.shape for e in jaxpr.eqns for v in e.outvars]
        return shapes.count((REPEATS, 2, LENGTH, 12))

    assert stacked(hybrid()) > 0 == stacked(hybrid(remat=True))


@pytest.mark.slow
def test_computation_in_bfloat16():
    model = hybrid(dtype=jnp.bfloat16)
    assert {p.dtype for p in parameters_of(model).values()} == {jnp.dtype(jnp.float32)}
    logits = jax.eval_shape(model, TOKENS)[0]
    assert logits.dtype == jnp.float32
    hidden, _ = jit(lambda model: model.hidden(TOKENS))(model)
    assert hidden.dtype == jnp.bfloat16
    want, _ = jit(lambda model: model.hidden(TOKENS))(hybrid())
    agree(want, np.asarray(hidden, np.float32), limit=0.05)


def test_repetitions_start_differently():
    model = jit(lambda: make(pattern=("mamba2",)))()
    for name, x in parameters_of(model).items():
        if name.endswith("kernel"):
            assert np.abs(x[0] - x[1]).max() > 0.01, name
    assert abs(np.std(model.embedding[...]) - 0.02) < 0.005


WRONG = {
    "pattern: got ()": {"pattern": ()},
    "pattern: got 'global'": {"pattern": (*PATTERN, "global")},
    "repeated at least once": {"repeats": 0},
    "mixer: got 'mamba9'": {"pattern": ("x",), "mixers": {"x": {"kind": "mamba9"}}},
    "mixer: got 'x'": {"pattern": ("x",), "mixers": {"x": {}}},
    "mixer 'attention': ": {"pattern": ("x",), "mixers": {"x": {"kind": "attention", "head": 2}}},
    "window: got 0": {"pattern": ("x",), "mixers": {"x": {"kind": "attention", "heads": 2, "window": 0}}},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors(message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        nnx.eval_shape(lambda: make(**WRONG[message]))
    assert "\n" not in str(error.value)
