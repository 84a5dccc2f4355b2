"""Runs that are killed, stopped, damaged or broken, through the command line."""

import json
import os
import signal
import time

import pytest

from effattn_jax.training.metrics import read_metrics
from tests.training.runs import finish, losses, run, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    run(workdir, "train.steps=40")
    return workdir


def steps_done(workdir):
    path = workdir / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(str(path))), default=0) if path.exists() else 0


def wait_for_step(workdir, process, step):
    deadline = time.monotonic() + 120
    while steps_done(workdir) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_kill_9_then_the_same_command(uninterrupted, tmp_path):
    for step in (6, 18):  # killed twice, at other places between checkpoints
        process = start(tmp_path, "train.steps=40")
        wait_for_step(tmp_path, process, step)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL
        assert steps_done(tmp_path) < 40
    out, _ = run(tmp_path, "train.steps=40")
    assert "resumed after step" in out
    assert losses(tmp_path) == losses(uninterrupted)  # bit for bit
    assert losses(tmp_path, "validation") == losses(uninterrupted, "validation")


def test_sigterm_saves_and_ends_well(uninterrupted, tmp_path):
    process = start(tmp_path, "train.steps=40", "train.checkpoint_every=1000")
    wait_for_step(tmp_path, process, 5)
    process.send_signal(signal.SIGTERM)
    out, err = finish(process)
    assert "stopped by SIGTERM after step" in out
    assert "Traceback" not in err
    out, _ = run(tmp_path, "train.steps=40", "train.checkpoint_every=1000")
    assert "resumed after step" in out
    assert losses(tmp_path) == losses(uninterrupted)


def test_truncated_newest_checkpoint(uninterrupted, tmp_path):
    run(tmp_path, "train.steps=40", "train.checkpoint_every=20")
    newest = tmp_path / "checkpoints" / "40" / "params"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    out, _ = run(tmp_path, "train.steps=40", "train.checkpoint_every=20")
    assert "checkpoint of step 40 cannot be used" in out
    assert "resuming from step 20" in out
    assert losses(tmp_path) == losses(uninterrupted)


def test_non_finite_loss_names_the_step_and_the_last_good_checkpoint(tmp_path):
    overrides = ("optimizer.learning_rate=1e30", "optimizer.warmup_steps=3", "train.checkpoint_every=1")
    _, err = run(tmp_path, *overrides, code=1)
    assert err.startswith("error: step 2 is not finite")
    assert "the last good checkpoint is step 1" in err
    assert len(err.splitlines()) == 1


def test_generate_and_evaluate_from_a_checkpoint(uninterrupted):
    out, _ = run(uninterrupted, "--prompt=def f", "--prompt=import os", "--tokens=8", experiment="generate")
    assert "step 40" in out
    assert "--- 'def f'\ndef f" in out
    out, _ = run(uninterrupted, "--length=320", experiment="evaluate")
    assert "beyond the length of training" in out
    assert (uninterrupted / "positions.png").stat().st_size > 5000


def test_evaluate_repeats_the_evaluation_of_the_run(uninterrupted):
    run(uninterrupted, "--length=80", experiment="evaluate")
    again = json.loads((uninterrupted / "evaluation.json").read_text())
    lines = read_metrics(str(uninterrupted / "metrics.jsonl"))
    (trained,) = (line["bits_per_byte"] for line in lines if line["split"] == "validation" and line["step"] == 40)
    assert again["bits_per_byte"] == pytest.approx(trained, rel=1e-6)


def test_the_report_of_a_run(uninterrupted):
    for name in ("loss.png", "summary.json", "config.json", "metrics.jsonl"):
        assert (uninterrupted / name).stat().st_size > 50
