"""A model with attached mechanisms: shared parameters, generation, what a model refuses."""

import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import Attention
from effattn_jax.layers.attached import AttachedAttention
from effattn_jax.models import LanguageModel, Session, generate
from effattn_jax.models.blueprint import parameters_of
from effattn_jax.sparse import Clustering, attention
from tests.layers.catalogue import agree, filled, jit

VOCAB, PROMPT, LENGTH = 23, 20, 26
TOKENS = np.random.default_rng(0).integers(VOCAB, size=(2, LENGTH))
CLUSTERING = Clustering(sink=2, clusters=3, window=4, window_clusters=2)
EVERYTHING = (  # of the two places in the pattern
    (("quest", {"budget": 32}), ("h2o", {"heavy": LENGTH, "recent": 4})),
    (("double_sparsity", {"heavy": LENGTH}), ("snapkv", {"window": 4, "capacity": LENGTH})),
    (
        ("cluster_kv", {"budget": LENGTH, "clustering": CLUSTERING}),
        ("retro", {"retrieval": 1.0, "estimation": 0.0, "clustering": CLUSTERING}),
    ),
    (("streaming", {"recent": LENGTH}), (None, {})),
)
FEW = (("quest", {"budget": 8, "page_size": 4}), ("h2o", {"heavy": 4, "recent": 3}))
forward = jit(lambda model, tokens: model(tokens)[0])


def make(**changes):
    options = {"vocab_size": VOCAB, "dim": 32, "mlp_dim": 32, "pattern": ("attention", "attention"), "repeats": 2}
    options |= {"mixers": {"attention": {"heads": 2}}} | changes
    return LanguageModel(**options, rngs=nnx.Rngs(0))


@functools.cache
def dense():
    return filled(make)


def decoding_by(mechanisms):
    model = dense()
    for layer, (name, options) in enumerate(mechanisms):
        model = model.with_attention(decode=name, decode_options=options, layers=[layer])
    return model


@jit
def prefilled_and_decoded(model, tokens):
    first, state = model(tokens[:, :PROMPT], model.init_state(*tokens.shape))
    return jnp.concatenate([first, model(tokens[:, PROMPT:], state)[0]], axis=1)


def test_parameters_are_shared():
    ours, theirs = parameters_of(dense()), parameters_of(decoding_by(FEW))
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert all(type(block.mixer) is Attention for _, block in dense().parts())


def test_prefill():
    few = {"prefill": "xattention", "prefill_options": {"tau": 0.2, "block_size": 4, "stride": 2}}
    by_name = forward(dense().with_attention(**few), TOKENS)
    everything = np.asarray(forward(dense(), TOKENS))
    assert np.isfinite(by_name).all()
    assert np.abs(by_name - everything).max() > 0.01 * np.abs(everything).max()
    all_of_it = few | {"prefill_options": {"tau": 1.1, "block_size": 4, "stride": 2}}
    agree(everything, forward(dense().with_attention(**all_of_it), TOKENS))
    own = dense().with_attention(prefill=lambda q, k, v, *, scale: attention(q, k, v, scale=scale))
    agree(everything, forward(own, TOKENS))


@pytest.mark.parametrize("mechanisms", EVERYTHING, ids=lambda pair: "-".join(str(name) for name, _ in pair))
@pytest.mark.slow
def test_everything_is_read(mechanisms):
    model = decoding_by(mechanisms)
    agree(forward(dense(), TOKENS), prefilled_and_decoded(model, TOKENS))
    want = generate(dense(), TOKENS[:, :PROMPT], max_new_tokens=6, temperature=0)
    np.testing.assert_array_equal(want, generate(model, TOKENS[:, :PROMPT], max_new_tokens=6, temperature=0))


@pytest.mark.slow
def test_few_are_read():
    """What is drawn is what the scores of the same tokens, given, are greatest for."""
    model = decoding_by(FEW)
    drawn = generate(model, TOKENS[:, :PROMPT], max_new_tokens=LENGTH - PROMPT, temperature=0)
    tokens = np.concatenate([TOKENS[:, :PROMPT], drawn], axis=1)
    scores = np.asarray(prefilled_and_decoded(model, tokens))
    np.testing.assert_array_equal(drawn, scores[:, PROMPT - 1 : -1].argmax(-1))
    everything = np.asarray(forward(dense(), tokens))
    assert np.isfinite(scores).all()
    agree(everything[:, :PROMPT], scores[:, :PROMPT])
    assert np.abs(scores - everything)[:, PROMPT:].max() > 0.01 * np.abs(everything).max()


@pytest.mark.slow
def test_session():
    """Its first tokens are the prompt, whatever the chunk."""
    model = decoding_by(FEW)
    session = Session(model, max_length=LENGTH, prefill_chunk=4)
    session.append(TOKENS[0, :PROMPT])
    said = session.generate(max_new_tokens=3, temperature=0)
    np.testing.assert_array_equal(generate(model, TOKENS[:1, :PROMPT], max_new_tokens=3, temperature=0)[0], said)
    session.append([3, 4])
    tokens = np.concatenate([TOKENS[0, :PROMPT], said, [3, 4]])[None]
    last = np.asarray(prefilled_and_decoded(model, np.pad(tokens, ((0, 0), (0, 1)))))[0, -2]
    assert session.generate(max_new_tokens=1, temperature=0) == last.argmax()


def test_layers():
    window = {"local": {"kind": "attention", "heads": 2, "window": 4}, "attention": {"heads": 2}}
    model = nnx.eval_shape(lambda: make(before=("attention",), pattern=("local", "attention"), mixers=window))
    found = lambda model: [type(block.mixer) is AttachedAttention for _, block in model.parts()]  # noqa: E731
    assert found(model.with_attention(decode="retro")) == [True, False, True]
    assert found(model.with_attention(decode="retro", layers=[2])) == [False, False, True]
    for layers in ([1], [0, 3], [-1], []):
        with pytest.raises(ValueError, match=re.escape(f"layers: got {layers}; needs some of [0, 2]")):
            model.with_attention(decode="retro", layers=layers)
    shared = {"attention": {"heads": 2}, "reader": {"kind": "attention", "heads": 2, "kv_from": "attention"}}
    model = nnx.eval_shape(lambda: make(pattern=("attention", "reader"), mixers=shared))
    with pytest.raises(ValueError, match=re.escape("layers: got []; needs some of []")):
        model.with_attention(decode="retro")


def test_prompts_that_do_not_fit():
    model = decoding_by(FEW)
    for message, prompts, options in (
        ("prompts: got several lengths", [[1, 2, 3], [4, 5]], {}),
        ("prefill_chunk: got 2", [[1, 2, 3]], {"prefill_chunk": 2}),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, prompts, max_new_tokens=2, temperature=0, **options)
