"""The three questions of benchmarks, against full passes over one text at a time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.pretrained import load, load_tokenizer
from effattn_jax.pretrained.text_model import TextModel
from tests.layers.catalogue import jit
from tests.pretrained.tiny_checkpoint import checkpoint

WINDOW, ROOM = 20, 64
forward = jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0]))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def text_model(path):
    return TextModel(load(path), load_tokenizer(path), window=WINDOW, batch_size=2)


def log_p(text_model, row):
    """log p over the vocabulary behind each token of a row; zeros behind the row do not matter."""
    tokens = np.zeros((1, ROOM), np.int32)
    tokens[0, : len(row)] = row
    return np.asarray(forward(text_model.model, jnp.asarray(tokens)), np.float64)[0, : len(row)]


def by_hand(text_model, context, continuation):
    """Of tokens: one sum, and whether each is the best."""
    row = [*context, *continuation][-WINDOW - 1 :]
    found, first = log_p(text_model, row), len(row) - len(continuation)
    places = range(first - 1, len(row) - 1)
    return sum(found[t, row[t + 1]] for t in places), all(found[t].argmax() == row[t + 1] for t in places)


def ids(text_model, text):
    return text_model.tokenizer.encode(text).tolist()


def test_log_likelihood(text_model):
    """A space at the end of a context belongs to what follows; a context that is too long loses its beginning."""
    bos = [text_model.tokenizer.bos]
    cases = {
        ("hello", " world"): (ids(text_model, "hello"), ids(text_model, " world")),
        ("hello ", "world"): (ids(text_model, "hello"), ids(text_model, " world")),
        ("", "he"): (bos, ids(text_model, "he")),
        ("hello " * 9 + "x", " wo"): (ids(text_model, "hello " * 9 + "x"), ids(text_model, " wo")),
    }
    found = text_model.log_likelihood(list(cases))
    want = [by_hand(text_model, *tokens) for tokens in cases.values()]
    np.testing.assert_allclose([total for total, _ in found], [total for total, _ in want], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in want]
    assert found[0] == found[1]


def test_the_greedy_continuation_is_known(text_model):
    """Of what is drawn greedily, as long as its text has the same tokens again."""
    best = next(
        (context, text_model.tokenizer.decode([token]))
        for context in ("hello", "a", "b", "world", "x y", "1", "2", "3", "q")
        for token in [log_p(text_model, ids(text_model, context))[-1].argmax()]
        if ids(text_model, context + text_model.tokenizer.decode([token])) == [*ids(text_model, context), token]
    )
    ((_, greedy),) = text_model.log_likelihood([best])
    assert greedy


def test_log_likelihood_rolling(text_model):
    texts = ["hello world", "", "naïve ☃ and so on, " * 3]
    found = text_model.log_likelihood_rolling(texts)
    for text, total in zip(texts, found, strict=True):
        row = [text_model.tokenizer.bos, *ids(text_model, text)]
        want, first = 0.0, 1
        while first < len(row):  # windows side by side; the last reaches back
            end = min(len(row), first + WINDOW)
            begin = max(0, end - WINDOW - 1)
            part = log_p(text_model, row[begin:end])
            want += sum(part[t - 1 - begin, row[t]] for t in range(first, end))
            first = end
        np.testing.assert_allclose(total, want, atol=2e-4)


def greedy_text(text_model, context, count):
    row = ids(text_model, context)
    for _ in range(count):
        row.append(int(log_p(text_model, row)[-1].argmax()))
    assert not set(row) & set(text_model.tokenizer.stop_tokens)
    return text_model.tokenizer.decode(row)[len(context) :]


@pytest.mark.slow
def test_generate_until(text_model):
    want = {context: greedy_text(text_model, context, 12) for context in ("hello", "wo", "a b c")}
    stop = {context: text[2] for context, text in want.items()}
    requests = [(context, {"until": [], "max_gen_toks": 12, "do_sample": False}) for context in want]
    requests += [(context, {"until": stop[context], "max_gen_toks": 12}) for context in want]
    requests += [("hello", {"until": ["zz", stop["hello"]], "max_gen_toks": 12})]
    found = text_model.generate_until(requests)
    assert found[:3] == list(want.values())
    assert found[3:6] == [text.split(stop[context])[0] for context, text in want.items()]
    assert found[6] == found[3]
    assert all(len(text) <= 2 for text in found[3:])


@pytest.mark.slow
def test_draws_depend_on_the_seed(path, text_model):
    ask = [("hello", {"do_sample": True, "temperature": 3.0, "max_gen_toks": 12})]
    other = TextModel(text_model.model, text_model.tokenizer, window=WINDOW, batch_size=2, seed=1)
    assert text_model.generate_until(ask) == text_model.generate_until(ask) != other.generate_until(ask)


WRONG = {
    "window: got 0": lambda model: TextModel(model.model, model.tokenizer, window=0),
    "continuation: got 0 tokens; needs 1 .. 20": lambda model: model.log_likelihood([("hello", "")]),
    "continuation: got 21 tokens; needs 1 .. 20": lambda model: model.log_likelihood([("x", "a" * 21)]),
    "requests[0]: got the options beams; needs some of until": lambda model: model.generate_until(
        [("x", {"beams": 2})]
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors(text_model, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WRONG[message](text_model)
