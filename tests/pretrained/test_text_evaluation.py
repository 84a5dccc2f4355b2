"""Bits per byte and per token, against a loop over tokens; the harness' questions, passed on."""

import math
import sys
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.pretrained import load, load_tokenizer
from effattn_jax.pretrained.text_evaluation import evaluate_texts
from tests.layers.catalogue import jit
from tests.pretrained.tiny_checkpoint import checkpoint
from tests.pretrained.tiny_tokenizer import write

TEXTS = ["hello world", "", "naïve ☃".encode()]
ROOM = 32
forward = jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0]))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def model(path):
    return load(path)


def nats(model, row):
    tokens = np.zeros((1, ROOM), np.int32)
    tokens[0, : len(row)] = row
    found = np.asarray(forward(model, jnp.asarray(tokens)), np.float64)[0]
    return -sum(found[t, row[t + 1]] for t in range(len(row) - 1))


def test_texts_each_by_itself(path, model):
    tokenizer = load_tokenizer(path)
    rows = [[tokenizer.bos, *tokenizer.encode(text)] for text in TEXTS]
    total, tokens = sum(nats(model, row) for row in rows), sum(len(row) - 1 for row in rows)
    found = evaluate_texts(model, tokenizer, TEXTS, window=30, batch_size=2)
    assert (found.tokens, found.bytes) == (tokens, len("hello world") + len("naïve ☃".encode()))
    np.testing.assert_allclose(found.nats, total, rtol=1e-5)
    np.testing.assert_allclose(found.bits_per_token, total / math.log(2) / tokens, rtol=1e-5)
    np.testing.assert_allclose(found.bits_per_byte, total / math.log(2) / found.bytes, rtol=1e-5)
    np.testing.assert_allclose(found.perplexity, 2**found.bits_per_token)


def test_without_a_token_that_opens_documents(tmp_path, model):
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_config={}))
    found = evaluate_texts(model, tokenizer, ["hello world", "x", ""], window=30, batch_size=2)
    row = tokenizer.encode("hello world")
    assert (found.tokens, found.bytes) == (len(row) - 1, 12)
    np.testing.assert_allclose(found.nats, nats(model, row), rtol=1e-5)
    with pytest.raises(ValueError, match="texts: got none with a token to predict"):
        evaluate_texts(model, tokenizer, ["x", ""], window=30)


class Request(NamedTuple):
    args: tuple


class Asked:
    """In place of a model of texts: says what it was asked."""

    tokenizer = types.SimpleNamespace(
        chat_template="its template",
        chat_text=lambda messages, *, add_generation_prompt: (messages, add_generation_prompt),
    )

    def log_likelihood(self, pairs):
        return [("likelihood", *pair) for pair in pairs]

    def log_likelihood_rolling(self, texts):
        return [("rolling", text) for text in texts]

    def generate_until(self, requests):
        return [("until", *request) for request in requests]


def test_what_the_harness_asks(monkeypatch):
    """Where the harness is not installed, over an empty class in place of its own."""
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError:
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["lm_eval.api.model"].LM = type("LM", (), {})
    from effattn_jax.pretrained.harness import HarnessModel

    model = HarnessModel(Asked(), "of this test")
    assert model.loglikelihood([Request(("a", "b")), Request(("c", "d"))]) == [
        ("likelihood", "a", "b"),
        ("likelihood", "c", "d"),
    ]
    assert model.loglikelihood_rolling([Request(("a",))]) == [("rolling", "a")]
    assert model.generate_until([Request(("a", {"until": ["b"]}))]) == [("until", "a", {"until": ["b"]})]
    assert model.apply_chat_template([{"role": "user"}], add_generation_prompt=False) == ([{"role": "user"}], False)
    assert (model.chat_template(True), model.chat_template(), model.tokenizer_name) == (
        "its template",
        None,
        "of this test",
    )
    sys.modules.pop("effattn_jax.pretrained.harness")
