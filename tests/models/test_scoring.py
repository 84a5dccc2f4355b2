"""Scores of tokens against full passes, one row at a time; windows against a loop over tokens."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.models.scoring import log_probability, token_scores, windows
from tests.layers.catalogue import jit
from tests.models.tiny import VOCAB, hybrid

RNG = np.random.default_rng(2)
ROWS = [RNG.integers(VOCAB, size=n) for n in (5, 40, 1, 17, 33)]
LONG = RNG.integers(VOCAB, size=90)
ROOM = 64  # one size for all, so that little is compiled
forward = jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0]))


def alone(row):
    """log p over the vocabulary behind each token, of a row by itself; what lies behind it does not matter."""
    tokens = np.zeros((1, ROOM), np.int32)
    tokens[0, : len(row)] = row
    return np.asarray(forward(hybrid(), jnp.asarray(tokens)))[0, : len(row) - 1]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_rows(batch_size):
    for row, found in zip(ROWS, token_scores(hybrid(), ROWS, batch_size=batch_size), strict=True):
        want = alone(row)
        np.testing.assert_allclose(found.log_probability, want[np.arange(len(row) - 1), row[1:]], atol=2e-5)
        np.testing.assert_array_equal(found.best, want.argmax(-1) == row[1:])
        assert found.best.shape == (len(row) - 1,)


def test_the_best_tokens_are_known():
    row = ROWS[0].tolist()
    for _ in range(3):
        row.append(int(alone([*row, 0])[-1].argmax()))
    (found,) = token_scores(hybrid(), [row], batch_size=2)
    assert found.best[-3:].all()


@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [(90, 20, 7), (90, 20, 20), (90, 30, 1), (90, 89, 5), (90, 200, 3), (2, 1, 1), (1, 5, 5)],
)
def test_windows_count_each_token_once(length, window, stride):
    found = list(windows(length, window, stride))
    counted = [t for part in found for t in range(part.first, part.end)]
    assert counted == list(range(1, length))
    for part in found:
        assert part.end - part.begin <= window + 1
        assert part.begin == 0 or part.end - part.begin == window + 1
        assert part.begin == 0 or part.first - part.begin >= window - stride + 1
        assert part.begin == 0 or part.end - part.first <= stride


@pytest.mark.parametrize(("window", "stride"), [(31, 7), (31, None)])
@pytest.mark.slow
def test_a_text_in_windows(window, stride):
    """Each token from the window that counts it, which a loop finds."""
    (found,) = log_probability(hybrid(), [LONG], window=window, stride=stride, batch_size=2)
    step, end, want = stride or window, window + 1, []
    begin = 0
    for t in range(1, len(LONG)):
        if t >= end:
            end = min(end + step, len(LONG))
            begin = end - window - 1
        want.append(alone(LONG[begin:end])[t - begin - 1, LONG[t]])
    np.testing.assert_allclose(found, want, atol=2e-5)


def test_a_text_of_one_token():
    (found,) = log_probability(hybrid(), [[3]], window=31, batch_size=2)
    assert found.shape == (0,)


WRONG = {
    "batch_size: got 0": lambda: token_scores(hybrid(), [[1]], batch_size=0),
    "rows[1]: got shape (0,)": lambda: token_scores(hybrid(), [[1], []]),
    "rows[0]: got tokens 1 .. 23": lambda: token_scores(hybrid(), [[1, VOCAB]]),
    "window: got 0": lambda: list(windows(5, 0, 1)),
    "stride: got 4; needs 1 .. 3, the window": lambda: list(windows(5, 3, 4)),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WRONG[message]()
