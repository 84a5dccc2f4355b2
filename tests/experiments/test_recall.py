"""Associative recall: rows are what the definition says, states have the sizes that are claimed, and the grid runs."""

import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import MIXERS
from experiments import recall
from experiments.recall import LARGE, SMALL, Recall, options

draw = jax.jit(recall.draw, static_argnums=(1, 2, 3))
TASK = Recall(length=48, keys=20, values=10)


@pytest.mark.parametrize("pairs", [1, 5, 12])
@pytest.mark.quick_cases(1)
def test_rows_ask_for_every_key_once(pairs):
    """Read back by a dictionary."""
    batch = jax.device_get(draw(jax.random.key(pairs), 16, (pairs,), TASK))
    assert batch.tokens.shape == batch.targets.shape == batch.scored.shape == (16, TASK.length)
    for tokens, targets, scored in zip(*batch, strict=True):
        shown = tokens[: 2 * pairs].reshape(pairs, 2)
        values = dict(shown.tolist())
        assert len(values) == pairs
        assert all(1 <= key <= TASK.keys < value < TASK.vocab_size for key, value in values.items())
        asked = np.flatnonzero(scored)
        assert asked.min() >= 2 * pairs
        assert sorted(tokens[asked]) == sorted(values)
        assert [values[key] for key in tokens[asked]] == [1 + TASK.keys + answer for answer in targets[asked]]
        rest = np.delete(tokens, np.concatenate([np.arange(2 * pairs), asked]))
        assert not rest.any()


def test_numbers_of_pairs_are_mixed():
    scored = draw(jax.random.key(0), 64, (2, 7), TASK).scored
    assert set(np.asarray(scored.sum(1))) == {2, 7}


def test_questions_come_soon_more_often_than_late():
    scored = np.asarray(draw(jax.random.key(0), 256, (4,), TASK).scored)
    assert scored[:, 8:28].sum() > 1.3 * scored[:, 28:].sum()


@pytest.mark.parametrize("grid", [SMALL, LARGE], ids=["small", "large"])
def test_states_have_the_claimed_size(grid):
    """In numbers per layer; the tails of convolutions and counters are not memory."""
    parts = {"mesa_net": 2, "log_linear": (grid.task.length - 1).bit_length() + 1}
    for state_dim in grid.state_dims:
        for mixer in grid.mixers:
            chosen = options(mixer, grid.dim, state_dim, grid.task.length)
            make = functools.partial(MIXERS[mixer], grid.dim, **chosen)
            state = jax.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)).init_state(1, 64))
            if mixer == "attention":
                continue
            numbers = sum(x.size for x in jax.tree.leaves(state.memory) if x.ndim > 2)
            normaliser = state_dim if mixer == "linear_attention" else 0
            assert numbers == state_dim * grid.dim * parts.get(mixer, 1) + normaliser, mixer


@pytest.mark.slow
def test_the_grid_runs(monkeypatch, tmp_path):
    tiny = SMALL._replace(task=TASK, pairs=(2, 4), state_dims=(4, 8), mixers=("attention", "delta_net"), dim=16, rows=4)
    monkeypatch.setattr(recall, "SMALL", tiny._replace(steps=3))
    monkeypatch.setattr("sys.argv", ["recall", f"--output={tmp_path}"])
    recall.main()
    report = json.loads((tmp_path / "recall.json").read_text())
    assert [(row["mixer"], row["state_dim"], row["steps"]) for row in report["rows"]] == [
        ("attention", 4, 3),
        ("delta_net", 4, 3),
        ("delta_net", 8, 3),
    ]
    for row in report["rows"]:
        assert row["accuracy"].keys() == {"2", "4"}
        assert all(0 <= value <= 1 for value in row["accuracy"].values())
    assert report["command"] == f"python -m experiments.recall --output={tmp_path}"
    assert (tmp_path / "recall.png").stat().st_size > 1000
