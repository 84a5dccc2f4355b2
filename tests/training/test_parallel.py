"""Many devices give the losses of one: emulated devices, both forms of the step, and two real processes."""

import socket

import numpy as np
import pytest

from tests.training.runs import finish, losses, run, start

LIMIT = 1e-5
QUIET = ("report.tokens=0", "report.baselines=False")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("single")
    run(workdir, *QUIET)
    return workdir


def assert_same_losses(reference, workdir):
    for split in ("train", "validation"):
        want, got = losses(reference, split), losses(workdir, split)
        assert want.keys() == got.keys()
        assert want
        np.testing.assert_allclose([got[s] for s in want], list(want.values()), rtol=LIMIT)


@pytest.mark.slow
def test_losses_fall_and_differ_from_step_to_step(single):
    values = list(losses(single).values())
    assert len(values) == 8
    assert len(set(values)) == 8
    assert values[-1] < values[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
        ("mesh.data=8", "train.step=shard_map"),
        ("mesh.data=4", "mesh.tensor=2", "train.microbatches=2", "model.remat=True"),
    ],
    ids=["data x fsdp x tensor", "shard_map", "accumulation and remat"],
)
def test_eight_devices(single, tmp_path, overrides):
    run(tmp_path, *overrides, *QUIET, devices=8)
    assert_same_losses(single, tmp_path)


@pytest.mark.slow
def test_shard_map_with_accumulation(single, tmp_path):
    run(tmp_path, "train.step=shard_map", "train.microbatches=4", *QUIET, devices=2)
    assert_same_losses(single, tmp_path)


def two_processes(workdir, *overrides):
    """The standard outputs of two processes of two devices each that make one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    together = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": "2"}
    processes = [
        start(workdir, *overrides, *QUIET, "--distributed", devices=2, **together, PROCESS_ID=str(index))
        for index in range(2)
    ]
    return [finish(process)[0] for process in processes]


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_and_resume(tmp_path):
    reference, workdir = tmp_path / "one", tmp_path / "two"
    run(reference, "optimizer.schedule=constant", *QUIET)
    two_processes(workdir, "optimizer.schedule=constant", "train.steps=4")
    first, second = two_processes(workdir, "optimizer.schedule=constant")
    assert "resumed after step 4" in first
    # one process speaks for both; the lines of the collectives' library are not ours
    assert [line for line in second.splitlines() if not line.startswith("[Gloo]")] == []
    assert_same_losses(reference, workdir)


@pytest.mark.slow
def test_two_processes_with_a_tensor_axis(single, tmp_path):
    two_processes(tmp_path, "mesh.data=2", "mesh.tensor=2")
    assert_same_losses(single, tmp_path)
