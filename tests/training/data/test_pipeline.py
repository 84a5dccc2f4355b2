"""The training stream: the same for any number of hosts, every document once an epoch, resumed exactly."""

import hashlib
import subprocess
import sys
import threading
from collections import Counter
from itertools import chain, islice, pairwise

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from effattn_jax.training.data.pipeline import TrainStream
from effattn_jax.training.data.tokenizer import ByteTokenizer

NAMES = {"inputs", "targets", "segment_ids", "positions"}


def documents(count=23, seed=0, longest=300):
    """Different documents, some empty or short, some longer than many rows."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice([1, 2, 15, 30, longest], count)
    return [b"%d:" % index + rng.integers(0, 256, n).astype(np.uint8).tobytes() for index, n in enumerate(lengths)]


def stream(source=None, **options):
    options = {"batch_size": 4, "sequence_length": 32, "seed": 3} | options
    return TrainStream(documents() if source is None else source, ByteTokenizer(), **options)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(got, wanted):
    assert len(got) == len(wanted) > 0
    for one, other in zip(got, wanted, strict=True):
        assert one.keys() == other.keys() == NAMES
        for name in NAMES:
            np.testing.assert_array_equal(one[name], other[name])


def rows_as_documents(batches, row):
    """The whole documents of a row's stream, read off its inputs and targets."""
    inputs, targets = (np.concatenate([batch[name][row] for batch in batches]) for name in ("inputs", "targets"))
    starts = np.flatnonzero(inputs == 256)
    assert starts[0] == 0
    texts = []
    for start, stop in pairwise(starts):
        assert targets[stop - 1] == 257
        np.testing.assert_array_equal(inputs[start + 1 : stop], targets[start : stop - 1])
        texts.append(inputs[start + 1 : stop].astype(np.uint8).tobytes())
    return texts


def test_batches_have_the_format():
    for batch in take(stream(), 50):
        assert batch.keys() == NAMES
        for values in batch.values():
            assert values.shape == (4, 32)
            assert values.dtype == np.int32
        assert (batch["segment_ids"][:, 0] == 0).all()
        assert np.isin(np.diff(batch["segment_ids"]), [0, 1]).all()
        starts = np.diff(batch["segment_ids"], prepend=-1) == 1
        assert (batch["positions"][starts] == 0).all()
        assert (np.diff(batch["positions"])[~starts[:, 1:]] == 1).all()


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_hosts(hosts):
    wanted = take(stream(), 120)
    parts = [take(stream(process_index=host, process_count=hosts), 120) for host in range(hosts)]
    got = [{name: np.concatenate([part[name] for part in step]) for name in NAMES} for step in zip(*parts, strict=True)]
    assert_same(got, wanted)


def test_every_document_once_an_epoch_in_a_new_order():
    source = documents()
    batches = take(stream(source), 400)
    texts = [rows_as_documents(batches, row) for row in range(4)]
    shares = [len(range(row, len(source), 4)) for row in range(4)]
    orders = []
    for epoch in range(4):
        parts = [text[epoch * share : (epoch + 1) * share] for text, share in zip(texts, shares, strict=True)]
        assert Counter(chain(*parts)) == Counter(source)
        orders.append(parts)
    assert all(one != other for index, one in enumerate(orders) for other in orders[:index])


def test_the_seed_decides_the_order():
    assert_same(take(stream(seed=5), 10), take(stream(seed=5), 10))
    first, second = take(stream(seed=5), 10), take(stream(seed=6), 10)
    assert any((one["inputs"] != other["inputs"]).any() for one, other in zip(first, second, strict=True))


def test_one_document_a_row_is_enough():
    texts = rows_as_documents(take(stream([b"only"], batch_size=1), 10), 0)
    assert set(texts) == {b"only"}


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.quick_cases(1)
def test_resumes_exactly(prefetch):
    """After any number of batches, over several epochs and in the middle of documents ten rows long."""
    batches = stream(prefetch=prefetch)
    states, wanted = [], []
    for _ in range(150):
        states.append(batches.get_state())
        wanted.append(next(batches))
    for count in (0, 1, 2, 50, 97, 140):
        fresh = stream(prefetch=prefetch)
        fresh.set_state(states[count])
        assert fresh.get_state() == states[count]
        assert_same(take(fresh, 150 - count), wanted[count:])
    batches.set_state(states[7])  # back, with batches made ahead that are no longer wanted
    assert_same(take(batches, 20), wanted[7:27])


@pytest.mark.slow
def test_resumes_in_another_process(tmp_path):
    (tmp_path / "data").mkdir()
    for index, text in enumerate(documents()):
        (tmp_path / "data" / f"{index}.bin").write_bytes(text)
    script = """
import hashlib, sys
from effattn_jax.training.data import ByteTokenizer, TrainStream, open_source
folder, state = sys.argv[1:]
source = open_source(f"folder:{folder}", "all", suffix=".bin")
batches = TrainStream(source, ByteTokenizer(), batch_size=4, sequence_length=32, seed=3)
before = [next(batches) for _ in range(60)]
if state:
    batches = TrainStream(source, ByteTokenizer(), batch_size=4, sequence_length=32, seed=3)
    batches.set_state(state.encode())
else:
    print(batches.get_state().decode())
after = [next(batches)[name].tobytes() for _ in range(60) for name in ("inputs", "targets", "segment_ids", "positions")]
print(hashlib.sha256(b"".join(after)).hexdigest())
"""

    def run(state):
        command = [sys.executable, "-c", script, str(tmp_path / "data"), state]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout.split("\n")[:-1]

    state, first = run("")
    (second,) = run(state)
    assert first == second != hashlib.sha256(b"").hexdigest()


def test_the_state_is_small():
    batches = stream(documents(600), batch_size=512)
    take(batches, 3)
    assert len(batches.get_state()) < 8192


def test_restoring_reads_only_the_documents_at_hand():
    class Counting(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    batches = stream(Counting(documents(longest=3000)), prefetch=0)
    take(batches, 500)
    source = Counting(documents(longest=3000))
    fresh = stream(source, prefetch=0)
    fresh.set_state(batches.get_state())
    reads = source.reads
    got = take(fresh, 1)
    assert source.reads - reads <= sum(int(row.max()) + 1 for row in got[0]["segment_ids"])


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_checkpoint_holds_the_state_at_the_save(tmp_path, hosts):
    batches = stream(process_index=hosts - 1, process_count=hosts)
    take(batches, 41)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        arguments = {"x": ocp.args.StandardSave({"w": np.arange(3)}), "data": grain.checkpoint.CheckpointSave(batches)}
        manager.save(41, args=ocp.args.Composite(**arguments))
        wanted = take(batches, 30)  # while the save may still be under way
        manager.wait_until_finished()
    fresh = stream(process_index=hosts - 1, process_count=hosts)
    take(fresh, 5)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        restored = manager.restore(41, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    assert restored["data"] is fresh
    assert_same(take(restored["data"], 30), wanted)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"seed": 4}, "seed"),
        ({"batch_size": 2}, "batch_size"),
        ({"sequence_length": 64}, "sequence_length"),
        ({"process_count": 2}, "rows"),
        ({"source": documents(24)}, "documents"),
    ],
)
def test_the_state_of_another_stream_is_refused(changed, name):
    state = stream(**changed).get_state()
    batches = stream()
    with pytest.raises(ValueError, match=rf"^state: got one saved with {name} = .*; needs {name} = "):
        batches.set_state(state)
    assert_same(take(batches, 3), take(stream(), 3))


def test_a_failed_read_is_raised_and_tried_again():
    class Failing(list):
        broken = False

        def __getitem__(self, index):
            if self.broken:
                raise OSError("disk away")
            return super().__getitem__(index)

    source = Failing(documents())
    batches = stream(source, prefetch=1)
    got = take(batches, 3)
    source.broken = True
    with pytest.raises(OSError, match="disk away"):
        got.extend(islice(batches, 500))  # those made ahead, then the failure
    source.broken = False
    got += take(batches, 30)
    assert_same(got, take(stream(prefetch=1), len(got)))


def test_a_dropped_stream_leaves_no_thread():
    before = threading.active_count()
    batches = stream()
    take(batches, 2)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("train_stream")]
    assert threads
    del batches
    for thread in threads:
        thread.join(timeout=10)
    assert threading.active_count() <= before


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"^process_count: got 3 hosts; needs a number that divides batch_size = 4"):
        stream(process_count=3)
    with pytest.raises(ValueError, match=r"^process_index: got 2; needs a host from 0 to 1"):
        stream(process_index=2, process_count=2)
    with pytest.raises(ValueError, match=r"^source: got 3 documents; needs one at least for each of the 4 rows"):
        stream(documents(3))
    with pytest.raises(ValueError, match=r"^sequence_length"):
        stream(sequence_length=0)
    with pytest.raises(ValueError, match="Seed must be an integer"):
        stream(seed=-1)
