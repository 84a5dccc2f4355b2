"""Many devices give the losses of one: emulated devices, both forms of the step, and two real processes."""

import socket

import numpy as np
import pytest

from tests.training.runs import finish, losses, run, start

LIMIT = 1e-5


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("single")
    run(workdir)
    return workdir


def assert_same_losses(reference, workdir):
    for split in ("train", "validation"):
        want, got = losses(reference, split), losses(workdir, split)
        assert want.keys() == got.keys()
        assert want
        np.testing.assert_allclose([got[s] for s in want], list(want.values()), rtol=LIMIT)


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
    run(tmp_path, *overrides, devices=8)
    assert_same_losses(single, tmp_path)


@pytest.mark.slow
def test_shard_map_with_accumulation(single, tmp_path):
    run(tmp_path, "train.step=shard_map", "train.microbatches=4", devices=2)
    assert_same_losses(single, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [("mesh.data=4",), ("mesh.data=2", "mesh.tensor=2")], ids=["data", "tensor"])
def test_two_processes_of_two_devices(single, tmp_path, overrides):
    """Also: both write one checkpoint together, and resume from it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"

    def both(steps):
        processes = [
            start(
                tmp_path,
                *overrides,
                f"train.steps={steps}",
                "optimizer.schedule=constant",
                "--distributed",
                devices=2,
                COORDINATOR_ADDRESS=address,
                NUM_PROCESSES="2",
                PROCESS_ID=str(index),
            )
            for index in range(2)
        ]
        return [finish(process) for process in processes]

    reference = tmp_path / "reference"
    run(reference, "optimizer.schedule=constant")
    both(4)
    (first, _), (second, _) = both(8)
    assert "resumed after step 4" in first
    assert second == ""  # one process speaks for all
    assert_same_losses(reference, tmp_path)
