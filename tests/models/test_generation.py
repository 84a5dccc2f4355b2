"""Continuations of a hybrid: with all the machinery what full forward passes say, one token after the other."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.models import Sampling, cut, generate
from tests.layers.catalogue import jit
from tests.models.tiny import VOCAB, hybrid

GREEDY, STEPS = Sampling(temperature=0), 7
PROMPTS = [np.random.default_rng(i).integers(VOCAB, size=n).tolist() for i, n in enumerate((5, 1, 12, 4))]
ROOM = 20
forward = jit(lambda model, tokens: model(tokens)[0])


@functools.cache
def by_full_passes():
    """Each prompt alone, without a cache: one best token after the other. Zeros behind a token do not matter."""
    continued = []
    for prompt in PROMPTS:
        tokens = np.zeros((1, ROOM), np.int32)
        tokens[0, : len(prompt)] = prompt
        for n in range(len(prompt), len(prompt) + STEPS):
            scores = np.sort(forward(hybrid(), tokens)[0, n - 1])
            assert scores[-1] - scores[-2] > 1e-3  # rounding cannot decide
            tokens[0, n] = np.argmax(forward(hybrid(), tokens)[0, n - 1])
        continued.append(tokens[0, len(prompt) : len(prompt) + STEPS])
    return continued


def assert_same(want, got):
    assert [row.tolist() for row in want] == [row.tolist() for row in got]


@functools.cache
def greedy():
    return generate(hybrid(), PROMPTS, max_new_tokens=STEPS, sampling=GREEDY)


def test_greedy_is_repeated_full_passes():
    assert_same(by_full_passes(), greedy())
    assert len({row.tobytes() for row in greedy()}) == len(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chunk", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(16, marks=pytest.mark.slow)]
)
def test_prefill_in_chunks(chunk):
    """Rows whose first chunks are padding only, in part, or not at all."""
    got = generate(hybrid(), PROMPTS, max_new_tokens=STEPS, sampling=GREEDY, prefill_chunk=chunk)
    assert_same(by_full_passes(), got)


@pytest.mark.slow
def test_one_prompt_alone():
    got = generate(hybrid(), [np.array(PROMPTS[1])], max_new_tokens=STEPS, sampling=GREEDY)
    assert_same(by_full_passes()[1:2], got)


@pytest.mark.parametrize("sampling", [Sampling(3.0, top_k=1), Sampling(0.5, top_p=1e-6)], ids=str)
@pytest.mark.quick_cases(1)
def test_only_the_best_token_can_be_drawn(sampling):
    got = generate(hybrid(), PROMPTS, max_new_tokens=STEPS, sampling=sampling, key=jax.random.key(3))
    assert_same(by_full_passes(), got)


@pytest.mark.slow
def test_stop_tokens():
    """Some rows stop, one at its first token; the others go on as if alone."""
    want = by_full_passes()
    stops = (int(want[0][0]), int(want[2][3]))
    before_stops = [row[: min([i for i, token in enumerate(row) if token in stops] + [STEPS])] for row in want]
    assert len(before_stops[0]) == 0
    assert {len(row) for row in before_stops} > {0}
    rows = generate(hybrid(), PROMPTS, max_new_tokens=STEPS, sampling=GREEDY, stop_tokens=stops)
    assert_same(before_stops, [cut(row, stops) for row in rows])
    assert [set(row[len(cut(row, stops)) :]) - set(stops) for row in rows] == [set()] * len(PROMPTS)


@pytest.mark.slow
def test_all_rows_stop_at_once():
    stops = tuple(range(VOCAB))
    rows = generate(hybrid(), PROMPTS, max_new_tokens=STEPS, sampling=GREEDY, stop_tokens=stops)
    assert [len(cut(row, stops)) for row in rows] == [0] * len(PROMPTS)
    assert all(len(set(row)) == 1 for row in rows)


@pytest.mark.slow
def test_one_token():
    got = generate(hybrid(), PROMPTS, max_new_tokens=1, sampling=GREEDY)
    assert_same([row[:1] for row in by_full_passes()], got)


def test_draws_depend_on_the_key_alone():
    draw = lambda seed: generate(hybrid(), PROMPTS, max_new_tokens=STEPS, key=jax.random.key(seed))  # noqa: E731
    first = draw(0)
    assert_same(first, draw(0))
    assert any((a != b).any() for a, b in zip(first, draw(1), strict=True))
    assert all(row.min() >= 0 and row.max() < VOCAB and row.dtype == np.int32 for row in first)


def test_parameters_of_the_caller_stay():
    """Buffers of the state are donated, those of the model are not."""
    greedy()
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(hybrid()))


WRONG = {
    "key: got None": {"sampling": Sampling()},
    "max_new_tokens: got 0": {"max_new_tokens": 0},
    "prefill_chunk: got 0": {"prefill_chunk": 0},
    "prompts: got none": {"prompts": []},
    "prompts[1]: got shape (0,)": {"prompts": [[1], []]},
    "prompts[0]: got shape (1, 2)": {"prompts": [[[1, 2]]]},
    "prompts[0]: got tokens 1 .. 23": {"prompts": [[1, VOCAB]]},
    "prompts[1]: got tokens -1 .. 3": {"prompts": [[1], [3, -1]]},
    "prompts[0]: got dtype float64": {"prompts": [[1.5, 2.0]]},
    "stop_tokens: got": {"stop_tokens": (VOCAB,)},
    "top_k: got 24": {"sampling": Sampling(0, top_k=VOCAB + 1)},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors(message):
    options = {"prompts": PROMPTS, "max_new_tokens": 2, "sampling": GREEDY} | WRONG[message]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        generate(hybrid(), options.pop("prompts"), **options)
    assert "\n" not in str(error.value)
