import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effattn_jax.training.checkpoint import Checkpoints, SaveError
from effattn_jax.training.restore import CheckpointError, MismatchError, quiet_orbax, restore_params

ROOT = Path(__file__).parents[2]


class Iterator:
    """A data iterator that is nothing but its position."""

    def __init__(self, position=0):
        self.position = position

    def get_state(self):
        return b'{"position": %d}' % self.position

    def set_state(self, state):
        self.position = int(state.decode().split(":")[1].strip("} "))


def make_state(seed, width=50):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "kernel": jax.random.normal(keys[0], (300, width)),
        "bias": jax.random.normal(keys[1], (7,), jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {"params": params, "optimizer": optimizer.init(params), "progress": {"step": jnp.int32(seed)}}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(wanted, got):
    assert jax.tree.structure(wanted) == jax.tree.structure(got)
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(directory, steps, **options):
    with Checkpoints(str(directory), **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), Iterator(10 * step))


def restore(directory, lines=None, state=None):
    """Restores in a new Checkpoints, and saves one more step: what stood in the way must not block the run."""
    iterator = Iterator()
    report = lines.append if lines is not None else pytest.fail
    with Checkpoints(str(directory), report=report) as checkpoints:
        step, got = checkpoints.restore_latest(abstract(state or make_state(0)), iterator)
        checkpoints.save(step + 1, got, iterator, wait=True)
        assert checkpoints.latest_step() == step + 1
    return step, got, iterator.position


def test_a_state_comes_back_bit_for_bit_with_its_iterator(tmp_path):
    save_steps(tmp_path, [1])
    step, state, position = restore(tmp_path)
    assert (step, position) == (1, 10)
    assert_same(make_state(1), state)


def test_nothing_to_restore_is_none(tmp_path):
    with Checkpoints(str(tmp_path / "new"), report=pytest.fail) as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state(0)), Iterator()) is None
        assert checkpoints.latest_step() is None


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
    state, iterator = make_state(1), Iterator(5)
    wanted = jax.tree.map(np.array, state)
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, state, iterator)
        iterator.position = 99
        jax.tree.map(lambda x: x.delete(), state)  # donated to the next step
    step, got, position = restore(tmp_path)
    assert (step, position) == (1, 5)
    assert_same(wanted, got)


def test_the_newest_and_the_periodic_checkpoints_are_kept(tmp_path):
    save_steps(tmp_path, range(1, 10), keep=2, keep_period=4)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [4, 8, 9]


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep_period": 0}])
def test_bad_retention_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match=rf"^{next(iter(options))}: got 0; needs at least 1"):
        Checkpoints(str(tmp_path), **options)


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(3, make_state(3))
        with pytest.raises(ValueError, match=r"^step: got 3; needs a step without a checkpoint"):
            checkpoints.save(3, make_state(3))
        with pytest.raises(ValueError, match=r"^state: got a part named 'data'"):
            checkpoints.save(4, {"data": {}})


def files_of(step_directory):
    return [path for path in sorted(step_directory.rglob("*")) if path.is_file()]


def largest(step_directory):
    return max(files_of(step_directory / "params"), key=lambda path: path.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def empty_directory(path):
    shutil.rmtree(path)
    path.mkdir()


DAMAGE = {
    "truncated shard": (lambda step: truncate(largest(step)), r"params/.* has \d+ of \d+ bytes"),
    "shard with a flipped bit": (lambda step: flip_a_bit(largest(step)), r"params/.* does not match its checksum"),
    "missing shard": (lambda step: largest(step).unlink(), r"params/.* is missing"),
    "truncated metadata": (lambda step: truncate(step / "params" / "_METADATA"), r"_METADATA has \d+ of \d+ bytes"),
    "empty metadata": (lambda step: os.truncate(step / "optimizer" / "_METADATA", 0), r"_METADATA has 0 of"),
    "iterator state": (lambda step: truncate(step / "data" / "process_0-of-1.json"), r"data/.* has \d+ of \d+ bytes"),
    "truncated checksums": (lambda step: truncate(step / "checksums.json"), r"checksums\.json is damaged"),
    "an item gone": (lambda step: shutil.rmtree(step / "optimizer"), r"optimizer/.* is missing"),
    "empty directory": (empty_directory, "it is incomplete"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.quick_cases(2)
def test_a_damaged_newest_checkpoint_is_passed_over_with_one_line(tmp_path, damage, capfd):
    harm, reason = DAMAGE[damage]
    save_steps(tmp_path, [1, 2])
    harm(tmp_path / "2")
    lines = []
    step, state, position = restore(tmp_path, lines)
    assert (step, position) == (1, 10)
    assert_same(make_state(1), state)
    assert len(lines) == 1
    assert lines[0].startswith("checkpoint of step 2 cannot be used: ")
    assert lines[0].endswith("; resuming from step 1")
    assert re.search(reason, lines[0]), lines[0]
    assert (tmp_path / "damaged-2").is_dir()
    assert capfd.readouterr() == ("", "")

    step, _, _ = restore(tmp_path)  # step 2 was saved again; nothing left to say
    assert step == 2


@pytest.mark.slow
def test_every_file_is_watched(tmp_path):
    """Whichever file is cut short, the state is right: the older one, or the newer if the file does not matter."""
    save_steps(tmp_path / "run", [1, 2])
    names = [path.relative_to(tmp_path / "run") for path in files_of(tmp_path / "run" / "2")]
    assert len(names) > 20
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "run", copy)
        truncate(copy / name)
        with Checkpoints(str(copy), report=lambda line: None) as checkpoints:
            step, state = checkpoints.restore_latest(abstract(make_state(0)), Iterator())
        assert step == (2 if len(name.parts) == 2 and name.name != "checksums.json" else 1), name
        assert_same(make_state(step), state)
        shutil.rmtree(copy)


def test_several_damaged_checkpoints_and_then_none(tmp_path):
    save_steps(tmp_path, [1, 2, 3])
    truncate(largest(tmp_path / "3"))
    empty_directory(tmp_path / "2")
    shutil.copytree(tmp_path, tmp_path.with_name("none"))
    lines = []
    assert restore(tmp_path, lines)[0] == 1
    assert [line.split()[3] for line in lines] == ["3", "2"]

    none = tmp_path.with_name("none")
    truncate(largest(none / "1"))
    with Checkpoints(str(none)) as checkpoints, pytest.raises(CheckpointError, match="no readable checkpoint") as error:
        checkpoints.restore_latest(abstract(make_state(0)))
    assert str(none) in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in none.iterdir()) == ["1", "2", "3"]  # nothing was touched


def other(change):
    state = make_state(0)
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            make_state(0, width=60),
            r"params kernel: float32\[300, 50\] in the checkpoint .*/2, float32\[300, 60\] in the",
        ),
        (
            other(lambda s: s["params"].update(new=jnp.ones(3))),
            r"params new: absent in the .* float32\[3\] in the model",
        ),
        (
            other(lambda s: s["params"].pop("bias")),
            r"params bias: bfloat16\[7\] in the checkpoint .*, absent in the model",
        ),
        (
            other(lambda s: s["params"].update(bias=jnp.ones(7))),
            r"params bias: bfloat16\[7\] in .*, float32\[7\] in the",
        ),
        (
            other(lambda s: s.update(average={"a": jnp.ones(3)})),
            r"average: absent in the checkpoint .*, which has data, opt",
        ),
        (
            other(lambda s: s.update(optimizer=optax.sgd(1.0, momentum=0.9).init(s["params"]))),
            r"optimizer 0\.trace\.bias: ",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_an_error_not_damage(tmp_path, state, message):
    save_steps(tmp_path, [1, 2])
    with Checkpoints(str(tmp_path), report=pytest.fail) as checkpoints:
        with pytest.raises(MismatchError, match=message) as error:
            checkpoints.restore_latest(abstract(state), Iterator())
        assert "\n" not in str(error.value)
        assert checkpoints.latest_step() == 2


def test_an_iterator_state_of_other_processes_is_an_error(tmp_path):
    save_steps(tmp_path, [1])
    (tmp_path / "1" / "data" / "process_0-of-1.json").rename(tmp_path / "1" / "data" / "process_0-of-2.json")
    table = tmp_path / "1" / "checksums.json"
    table.write_text(table.read_text().replace("process_0-of-1", "process_0-of-2"))
    with Checkpoints(str(tmp_path)) as checkpoints, pytest.raises(MismatchError, match=r"needs process_0-of-1\.json"):
        checkpoints.restore_latest(abstract(make_state(0)), Iterator())


def test_parameters_are_read_alone_and_cast(tmp_path):
    save_steps(tmp_path, [1, 2, 3])
    shutil.rmtree(tmp_path / "3" / "optimizer")  # of no concern here
    truncate(largest(tmp_path / "2"))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), make_state(0)["params"])
    step, params = restore_params(str(tmp_path), shapes, report=pytest.fail)
    assert step == 3
    assert_same(jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_state(3)["params"]), params)

    truncate(largest(tmp_path / "3"))
    lines = []
    step, _ = restore_params(str(tmp_path), shapes, report=lines.append)
    assert step == 1
    assert [line.split(":")[0] for line in lines] == [f"checkpoint of step {bad} cannot be used" for bad in (3, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]  # a reader moves nothing

    for wanted, message in (
        (2, r"no readable checkpoint \(step 2: params/"),
        (9, r"no checkpoint of step 9; there are"),
    ):
        with pytest.raises(CheckpointError, match=message):
            restore_params(str(tmp_path), shapes, step=wanted)
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        restore_params(str(tmp_path / "nowhere"), shapes)


def test_the_state_of_a_module_round_trips(tmp_path):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])

    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, {"params": state}, wait=True)
        assert_same(state, checkpoints.restore_latest({"params": abstract(state)})[1]["params"])
        wider = abstract(nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param))
        with pytest.raises(MismatchError, match="params "):
            checkpoints.restore_latest({"params": wider})


def test_a_disk_that_fails_ends_in_one_line_with_the_last_good_step(tmp_path, capfd):
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(1, make_state(1), Iterator(10), wait=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # writes past 20 kB fail, as on a full disk
        checkpoints.save(2, make_state(2), Iterator(20))
        with pytest.raises(SaveError, match=r"^checkpoint of step 2 was not written to .*: File too large; .* step 1$"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(SaveError, match="step 2 was not written"):
        checkpoints.save(3, make_state(3))
    checkpoints.close()
    assert capfd.readouterr() == ("", "")
    lines = []
    assert restore(tmp_path, lines)[0] == 1
    assert lines == ["checkpoint of step 2 is unfinished: the run ended while it was written; resuming from step 1"]


def test_only_the_echoes_of_a_failed_write_are_dropped(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    for _ in range(2):
        quiet_orbax()
    events = [
        SimpleNamespace(exc_value=error) for error in (RuntimeError("Event loop is closed"), RuntimeError("other"))
    ]
    for event in events:
        sys.unraisablehook(event)
    assert seen == events[1:]


def run_script(script, *arguments, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


KILLED = """
import os, signal, sys
from effattn_jax.training import checkpoint
from tests.training.test_checkpoint import Iterator, make_state
directory, moment = sys.argv[1:]
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoints = checkpoint.Checkpoints(directory)
checkpoints.save(1, make_state(1), Iterator(10), wait=True)
if moment == "before the commit":
    checkpoint.write_checksums = kill
checkpoints.save(2, make_state(2, width=20_000), Iterator(20))
kill() if moment == "at once" else checkpoints.wait()
"""


@pytest.mark.parametrize("moment", ["at once", "before the commit"])
@pytest.mark.quick_cases(1)
def test_a_run_killed_while_saving_resumes_from_the_step_before(tmp_path, moment):
    process = run_script(KILLED, tmp_path, moment)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert not (tmp_path / "2").exists()
    lines = []
    step, state, position = restore(tmp_path, lines)
    assert (step, position) == (1, 10)
    assert_same(make_state(1), state)
    assert lines == ["checkpoint of step 2 is unfinished: the run ended while it was written; resuming from step 1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]  # what was half-written is gone


RESHARDED = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from effattn_jax.training.checkpoint import Checkpoints
from effattn_jax.training.restore import restore_params
x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
wide, tall = jax.make_mesh((8,), ("a",)), jax.make_mesh((2, 4), ("a", "b"))
place = lambda mesh, *spec: NamedSharding(mesh, P(*spec))
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"params": {"x": jax.device_put(x, place(wide, "a"))}}, wait=True)
for sharding in (place(wide, None, "a"), place(tall, "b", "a"), place(tall), place(tall, ("a", "b"))):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    _, state = checkpoints.restore_latest({"params": {"x": shape}})
    assert state["params"]["x"].sharding == sharding
    assert np.array_equal(state["params"]["x"], x)
_, params = restore_params(sys.argv[1], {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
assert params["x"].devices() == {jax.devices()[0]} and np.array_equal(params["x"], x)
checkpoints.close()
print("done")
"""


def test_a_state_is_restored_onto_another_sharding(tmp_path):
    output, errors = run_script(RESHARDED, tmp_path, devices=8).communicate(timeout=120)
    assert (output, errors) == ("done\n", "")


TWO_PROCESSES = """
import sys, jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
directory, port, me = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=me)
import os, glob
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from effattn_jax.training.checkpoint import Checkpoints
from tests.training.test_checkpoint import Iterator, truncate
from pathlib import Path
mesh = jax.make_mesh((4,), ("a",))
def state(step):
    x = np.random.default_rng(step).normal(size=(16, 24)).astype(np.float32)
    put = lambda v, *spec: jax.make_array_from_callback(v.shape, NamedSharding(mesh, P(*spec)), lambda i: v[i])
    return {"params": {"x": put(x, "a")}, "progress": {"step": put(np.int32(step))}}
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
with Checkpoints(directory) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, state(step), Iterator(100 * me + step))
multihost_utils.sync_global_devices("saved")
if me == 0:
    shards = [p for p in Path(directory, "2", "params").rglob("ocdbt.process_1/d/*")]
    truncate(max(shards, key=lambda p: p.stat().st_size))
multihost_utils.sync_global_devices("damaged")
lines, iterator = [], Iterator()
with Checkpoints(directory, report=lines.append) as checkpoints:
    step, got = checkpoints.restore_latest(abstract, iterator)
    assert (step, iterator.position) == (1, 100 * me + 1), (step, iterator.position)
    assert len(lines) == 1 and "step 2 cannot be used" in lines[0] and "resuming from step 1" in lines[0], lines
    for a, b in zip(jax.tree.leaves(state(1)), jax.tree.leaves(got), strict=True):
        assert all(np.array_equal(s.data, t.data) for s, t in zip(a.addressable_shards, b.addressable_shards))
    checkpoints.save(2, got, iterator)
print("done")
"""


@pytest.mark.slow
def test_two_processes_save_and_agree_on_what_is_damaged(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [run_script(TWO_PROCESSES, tmp_path, port, me, devices=2) for me in (0, 1)]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
        assert output.splitlines()[-1] == "done"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "damaged-2"]
