"""State tracking: the tables are groups, the answers are products, and the models run."""

import itertools
import json

import jax
import numpy as np
import pytest

from experiments import state_tracking
from experiments.state_tracking import SMALL, TASKS, draw, parity_table, s3_table


@pytest.mark.parametrize("table", [parity_table(), s3_table()], ids=["parity", "S3"])
def test_tables_are_groups(table):
    elements = range(len(table))
    assert all(sorted(row) == list(elements) for row in [*table, *table.T])
    assert list(table[0]) == list(table[:, 0]) == list(elements)
    assert all(table[table[a, b], c] == table[a, table[b, c]] for a, b, c in itertools.product(elements, repeat=3))


def test_permutations_do_not_commute():
    assert (s3_table() != s3_table().T).any()


@pytest.mark.slow
def test_answers_of_parity_are_counts_of_ones():
    batch = jax.device_get(draw(jax.random.key(0), 8, 33, parity_table()))
    np.testing.assert_array_equal(batch.targets, np.cumsum(batch.tokens, 1) % 2)
    assert batch.scored.all()


def test_answers_of_s3_are_where_three_things_end_up():
    """Each token moves things about; the answer is the one permutation that does it at once."""
    permutations = np.array(list(itertools.permutations(range(3))))
    batch = jax.device_get(draw(jax.random.key(0), 8, 33, s3_table()))
    for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
        things = np.arange(3)
        for token, target in zip(tokens, targets, strict=True):
            things = permutations[token][things]
            np.testing.assert_array_equal(things, permutations[target])


@pytest.mark.slow
def test_the_models_run(monkeypatch, tmp_path):
    tiny = SMALL._replace(dim=8, length=6, lengths=(6, 12), rows=4, steps=2, seeds=1)
    one = {"S3": TASKS["S3"]._replace(models={"DeltaProduct": TASKS["S3"].models["DeltaProduct 2, β < 2"]})}
    monkeypatch.setattr(state_tracking, "TASKS", one)
    monkeypatch.setattr(state_tracking, "SMALL", tiny)
    monkeypatch.setattr("sys.argv", ["state_tracking", f"--output={tmp_path}"])
    state_tracking.main()
    report = json.loads((tmp_path / "state_tracking.json").read_text())
    (row,) = report["rows"]
    assert (row["task"], row["model"], row["steps"]) == ("S3", "DeltaProduct", 6)
    assert row["accuracy"].keys() == {"6", "12"}
    assert (tmp_path / "state_tracking.png").stat().st_size > 1000
