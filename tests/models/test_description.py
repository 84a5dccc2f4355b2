"""Descriptions against counts by hand and what is really there."""

import functools

import jax
import pytest
from flax import nnx

from effattn_jax.models import LanguageModel, sizes
from effattn_jax.models.blueprint import blueprint
from effattn_jax.models.description import describe
from tests.models.test_sizes import HEADS, MATRICES, REPEATS, STATE
from tests.models.tiny import DIM, MLP, VOCAB, hybrid, make

CONTEXTS = (2, 10, 1000)
EXPERTS, TAKEN = 5, 2


@functools.cache
def described(**changes):
    return describe(blueprint(lambda: make(**changes)), CONTEXTS)


def test_layers():
    assert described().layers == (
        ("mamba2 + swiglu", REPEATS),
        ("attention, window 3 + swiglu", REPEATS),
        ("attention + swiglu", REPEATS),
    )


@pytest.mark.parametrize("tied", [True, False])
def test_parameters(tied):
    found, want = described(tie_embeddings=tied), sizes(hybrid(tie_embeddings=tied), 10)
    assert (found.parameters, found.embedding_parameters) == (want.parameters, want.embedding_parameters)
    assert found.active_parameters == want.parameters - (0 if tied else VOCAB * DIM)


def test_memory_is_what_there_is():
    for at in described().contexts:
        state = hybrid().init_state(1, at.context)
        assert at.bytes == sum(x.nbytes for x in jax.tree.leaves(state))
        keys = REPEATS * at.context * 4 * (2 * 2 * 6 + 1)  # of the layer without a window: key, value, document
        assert at.cache_bytes == keys


def test_flops():
    memory = 4 * HEADS * STATE * 4
    read = lambda keys: REPEATS * (memory + 4 * 8 * min(3, keys) + 4 * 12 * keys)  # noqa: E731
    for at in described().contexts:
        assert at.decode_flops == 2 * (MATRICES + VOCAB * DIM) + read(at.context)
        assert at.prefill_flops == 2 * MATRICES + read((at.context + 1) / 2)


def test_experts():
    """Beside the layers of a pattern, some before and after it."""
    experts = {"mlp": "moe", "mlp_options": {"experts": EXPERTS, "top_k": TAKEN}}
    mixers = {"dense": {"kind": "attention", "heads": 2}, "sparse": {"kind": "attention", "heads": 2} | experts}
    layers = {"before": ("dense",), "pattern": ("sparse", "dense"), "repeats": 2, "after": ("sparse",)}
    make = lambda: LanguageModel(vocab_size=VOCAB, dim=DIM, mlp_dim=MLP, mixers=mixers, **layers, rngs=nnx.Rngs(0))  # noqa: E731
    found = describe(blueprint(make), CONTEXTS)
    assert found.layers == (("attention + swiglu", 3), ("attention + 2 of 5 experts", 3))
    assert found.parameters - found.active_parameters == 3 * (EXPERTS - TAKEN) * 3 * DIM * MLP
    matrices = 6 * 4 * DIM * DIM + 3 * 3 * DIM * MLP + 3 * (TAKEN * 3 * DIM * MLP + DIM * EXPERTS)
    assert found.contexts[0].prefill_flops == 2 * matrices + 6 * 4 * DIM * 1.5
