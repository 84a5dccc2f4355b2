"""Streams against `generate`, and conversations against full passes over all their tokens."""

import functools
import re

import jax
import numpy as np
import pytest

from effattn_jax.models import Sampling, Session, cut, generate, generation, stream
from effattn_jax.models.session import pieces
from tests.layers.catalogue import jit
from tests.models.tiny import VOCAB, hybrid

PROMPT = np.random.default_rng(5).integers(VOCAB, size=11).tolist()
MORE = np.random.default_rng(6).integers(VOCAB, size=6).tolist()
STEPS, ROOM = 7, 64  # one size for all, so that little is compiled
forward = jit(lambda model, tokens: model(tokens)[0])


@functools.cache
def best(tokens):
    """What comes after the tokens, each step a full pass without a cache. Zeros behind a token do not matter."""
    row = np.zeros((1, ROOM), np.int32)
    row[0, : len(tokens)] = tokens
    for n in range(len(tokens), len(tokens) + STEPS):
        scores = np.sort(forward(hybrid(), row)[0, n - 1])
        assert scores[-1] - scores[-2] > 1e-4  # rounding cannot decide
        row[0, n] = np.argmax(forward(hybrid(), row)[0, n - 1])
    return row[0, len(tokens) : len(tokens) + STEPS].tolist()


def said(*tokens):
    return best(tuple(map(int, tokens)))


def session():
    return Session(hybrid(), max_length=ROOM, prefill_chunk=4)


DRAWN = {"sampling": Sampling(2.0, top_k=9), "key": jax.random.key(1)}


@pytest.mark.parametrize("block", [3, pytest.param(7, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)])
def test_a_stream_is_what_generate_gives(block):
    """Blocks that divide the number of tokens and blocks that do not."""
    want = generate(hybrid(), [PROMPT], max_new_tokens=STEPS, **DRAWN)[0].tolist()
    assert want != said(*PROMPT)
    assert list(stream(hybrid(), PROMPT, max_new_tokens=STEPS, block=block, **DRAWN)) == want


def test_a_stream_takes_the_best_tokens_and_ends_before_a_stop_token():
    for stop in (0, *said(*PROMPT)):
        assert stop != 0 or 0 not in said(*PROMPT)
        got = list(stream(hybrid(), PROMPT, max_new_tokens=STEPS, temperature=0.0, stop_tokens=(stop,), block=3))
        assert got == cut(np.array(said(*PROMPT)), (stop,)).tolist()


@pytest.mark.slow
def test_a_stream_comes_in_blocks(monkeypatch):
    """The first tokens are there before the last are drawn."""
    calls = []
    draw = generation.draw
    monkeypatch.setattr(generation, "draw", lambda *args, **options: (calls.append(1), draw(*args, **options))[1])
    got = stream(hybrid(), PROMPT, max_new_tokens=STEPS, temperature=0.0, stop_tokens=(0,), block=3)
    seen = [(next(got), len(calls)) for _ in range(STEPS)]
    assert seen == list(zip(said(*PROMPT), (1, 1, 1, 2, 2, 2, 3), strict=True))


@pytest.mark.slow
def test_a_conversation_is_one_row():
    talk = session()
    talk.append(PROMPT)
    first = list(talk.stream(max_new_tokens=STEPS, temperature=0.0, stop_tokens=(0,), block=3))
    assert first == said(*PROMPT)
    talk.append(MORE)
    assert list(talk.tokens) == [*PROMPT, *first, *MORE]
    second = list(talk.stream(max_new_tokens=STEPS, temperature=0.0, stop_tokens=(0,), block=3))
    assert second == said(*PROMPT, *first, *MORE)
    third = list(talk.stream(max_new_tokens=STEPS, temperature=0.0, stop_tokens=(0,), block=3))
    assert third == said(*PROMPT, *first, *MORE, *second)
    assert list(talk.tokens) == [*PROMPT, *first, *MORE, *second, *third]


@pytest.mark.slow
def test_a_stop_token_is_part_of_the_conversation():
    stop = said(*PROMPT)[3]
    kept = said(*PROMPT)[: said(*PROMPT).index(stop)]
    talk = session()
    talk.append(PROMPT)
    assert list(talk.stream(max_new_tokens=STEPS, temperature=0.0, stop_tokens=(stop,), block=3)) == kept
    assert list(talk.tokens) == [*PROMPT, *kept, stop]
    talk.append(MORE)
    got = list(talk.stream(max_new_tokens=STEPS, temperature=0.0, stop_tokens=(0,), block=3))
    assert got == said(*PROMPT, *kept, stop, *MORE)


@pytest.mark.slow
def test_draws_of_a_conversation():
    talk = session()
    talk.append(PROMPT)
    want = generate(hybrid(), [PROMPT], max_new_tokens=STEPS, **DRAWN)[0].tolist()
    assert talk.generate(max_new_tokens=STEPS, **DRAWN).tolist() == want


@pytest.mark.slow
def test_following_reads_only_what_is_new(monkeypatch):
    talk, read = session(), []
    append = talk.append
    monkeypatch.setattr(talk, "append", lambda tokens: (read.append(len(tokens)), append(tokens)))
    answer = lambda: list(talk.stream(max_new_tokens=STEPS, temperature=0.0, stop_tokens=(0,), block=3))  # noqa: E731
    talk.follow(PROMPT)
    talk.follow([*PROMPT, *MORE])
    talk.follow([*PROMPT, *MORE])
    assert read == [len(PROMPT), len(MORE)]
    assert answer() == said(*PROMPT, *MORE)
    talk.follow([*PROMPT, MORE[0]])  # what was there is longer, and other
    assert read == [len(PROMPT), len(MORE), len(PROMPT) + 1]
    assert answer() == said(*PROMPT, MORE[0])


@pytest.mark.parametrize("length", [1, 5, 8, 13, 16, 31])
def test_pieces_add_up(length):
    parts = pieces(length, 8)
    assert sum(parts) == length
    assert set(parts) <= {8, 4, 2, 1}
    assert parts == sorted(parts, reverse=True)


WRONG = {
    "block: got 0; needs": lambda: stream(hybrid(), PROMPT, max_new_tokens=1, temperature=0.0, block=0),
    "key: got None; needs": lambda: stream(hybrid(), PROMPT, max_new_tokens=1),
    "prompts[0]: got shape (0,); needs": lambda: stream(hybrid(), [], max_new_tokens=1, temperature=0.0),
    "max_length: got 0; needs": lambda: Session(hybrid(), max_length=0),
    "prefill_chunk: got 0; needs": lambda: Session(hybrid(), max_length=9, prefill_chunk=0),
    "session: got no tokens; needs": lambda: Session(hybrid(), max_length=9).stream(max_new_tokens=1, temperature=0.0),
    "tokens: got 11 tokens; needs at most 9": lambda: Session(hybrid(), max_length=9).append(PROMPT),
    "tokens: got tokens 23 .. 23; needs": lambda: Session(hybrid(), max_length=9).append([VOCAB]),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors(message):
    """At once: a stream need not be asked for its first token."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        WRONG[message]()
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_no_room_for_an_answer():
    talk = session()
    talk.append(PROMPT)
    with pytest.raises(ValueError, match="max_new_tokens: got 54 tokens; needs at most 53, what is left of max_length"):
        talk.generate(max_new_tokens=54, temperature=0.0)
