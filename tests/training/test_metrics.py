import json
import math

import numpy as np
import pytest

from effattn_jax.training.metrics import FILE, MetricWriter, read_metrics


def steps_of(path):
    return [line["step"] for line in read_metrics(path)]


def test_lines_are_readable_while_the_run_goes_on(tmp_path):
    writer = MetricWriter(str(tmp_path / "new" / "run"))
    writer.write(1, "train", {"loss": np.float32(2.5), "tokens": 128})
    writer.write(1, "validation", {"bits_per_byte": 3})
    lines = (tmp_path / "new" / "run" / FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "split": "train", "loss": 2.5, "tokens": 128.0},
        {"step": 1, "split": "validation", "bits_per_byte": 3.0},
    ]
    writer.close()


def test_not_finite_values_are_valid_json_and_read_back(tmp_path):
    with MetricWriter(str(tmp_path)) as writer:
        writer.write(3, "train", {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    json.loads((tmp_path / FILE).read_text(), parse_constant=refuse)
    (line,) = read_metrics(str(tmp_path / FILE))
    assert math.isnan(line["a"])
    assert (line["b"], line["c"]) == (math.inf, -math.inf)


def test_a_killed_and_resumed_run_has_each_step_once(tmp_path):
    path = str(tmp_path / FILE)
    with MetricWriter(str(tmp_path)) as writer:
        for step in range(1, 8):
            writer.write(step, "train", {"loss": 1 / step})
    with open(path, "a") as file:
        file.write('{"step": 8, "split": "tr')  # killed in the middle of a line
    assert steps_of(path) == [1, 2, 3, 4, 5, 6, 7]

    with MetricWriter(str(tmp_path)) as writer:
        writer.resume(5)
        for step in range(6, 10):
            writer.write(step, "train", {"loss": 1 / step})
    assert steps_of(path) == list(range(1, 10))
    assert [line["loss"] for line in read_metrics(path)] == [1 / step for step in range(1, 10)]


def test_resume_from_nothing_empties_the_file(tmp_path):
    with MetricWriter(str(tmp_path)) as writer:
        writer.write(0, "validation", {"loss": 1.0})
    with MetricWriter(str(tmp_path)) as writer:
        writer.resume(None)
        writer.write(0, "validation", {"loss": 2.0})
    assert [line["loss"] for line in read_metrics(str(tmp_path / FILE))] == [2.0]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / FILE).write_text('{"step": 1, "split": "train"}\n{"step": 2,\n{"step": 3, "split": "train"}\n')
    with pytest.raises(ValueError, match=r"line 2: got .*; needs a JSON object"):
        read_metrics(str(tmp_path / FILE))


def test_an_inactive_writer_writes_nothing(tmp_path):
    with MetricWriter(str(tmp_path / "run"), tensorboard=True, active=False) as writer:
        writer.resume(3)
        writer.write(4, "train", {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_tensorboard_events_are_written(tmp_path):
    with MetricWriter(str(tmp_path), tensorboard=True) as writer:
        writer.write(1, "train", {"loss": 1.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()
