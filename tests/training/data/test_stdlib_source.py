"""The standard library as a dataset: the right files, in order, prepared once, without TensorFlow and without noise."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from effattn_jax.training.data.sources import open_source
from effattn_jax.training.data.split import split_of
from effattn_jax.training.data.stdlib_source import PythonStdlib, digest, stdlib_files

OPEN = """
import sys, sysconfig
if len(sys.argv) > 2:
    sysconfig.get_path = lambda name: sys.argv[2]
from effattn_jax.training.data import open_source
source = open_source("python_stdlib", "train", sys.argv[1])
print(source.fingerprint, len(source), sum(len(source[i]) for i in range(len(source))))
assert "tensorflow" not in sys.modules
"""


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", OPEN, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == "", "preparation is not quiet"
    assert out.count("\n") == 1, "preparation is not quiet"
    return out


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    builder = PythonStdlib(data_dir=tmp_path_factory.mktemp("tfds"))
    builder.download_and_prepare()
    return {split: list(builder.as_data_source(split)) for split in ("train", "validation")}


def test_holds_the_librarys_files_in_order(examples):
    library = Path(sysconfig.get_path("stdlib"))
    for split, rows in examples.items():
        names = [row["file"].decode() for row in rows]
        assert names == sorted(names)
        assert all(row["text"] == (library / name).read_bytes() for row, name in zip(rows, names, strict=True))
        assert {split_of(name) for name in names} == {split}
        assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages"))
    names = {row["file"].decode() for rows in examples.values() for row in rows}
    assert {"inspect.py", "json/decoder.py", "asyncio/base_events.py", "zoneinfo/__init__.py"} <= names
    size = {split: sum(len(row["text"]) for row in rows) for split, rows in examples.items()}
    assert 0.02 < size["validation"] / sum(size.values()) < 0.06


@pytest.mark.slow
def test_two_processes_prepare_at_once_quietly_and_without_tensorflow(tmp_path):
    first, second = start(tmp_path), start(tmp_path)
    assert finish(first) == finish(second)
    assert not list(tmp_path.rglob("incomplete*"))


@pytest.mark.slow
def test_a_changed_library_is_prepared_anew(tmp_path):
    library, data = tmp_path / "lib", tmp_path / "data"
    library.mkdir()
    for index in range(60):  # enough that neither split is empty
        (library / f"module{index}.py").write_text(f"x = {index}\n")
    before = finish(start(data, library))
    (library / "module0.py").write_text("x = 7\n")
    after = finish(start(data, library))
    assert before.split()[1:] == after.split()[1:]
    assert before != after


def test_leaves_out_what_is_no_library_text(tmp_path):
    (tmp_path / "a" / "tests").mkdir(parents=True)
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "b.py").write_bytes(b"b = 1")
    (tmp_path / "a" / "c.py").write_bytes("ü = 1\r\n".encode())
    for name in ("a/tests/d.py", "pydoc_data/topics.py", "_sysconfigdata_linux.py", "note.txt"):
        (tmp_path / name).write_bytes(b"d = 1")
    (tmp_path / "latin.py").write_bytes(b"# \xfc")
    (tmp_path / "empty.py").write_bytes(b"")
    files = stdlib_files(tmp_path)
    assert files == [("a/c.py", "ü = 1\r\n".encode()), ("b.py", b"b = 1")]
    assert digest(files) != digest(files[:1]) != digest([("b.py", files[0][1])])


def test_a_library_without_sources_is_an_error(tmp_path):
    (tmp_path / "os.pyc").write_bytes(b"\0")
    with pytest.raises(FileNotFoundError, match=r"python_stdlib: no \.py files in .*; needs an interpreter that ships"):
        stdlib_files(tmp_path)


def test_splits_of_the_library(tmp_path):
    train, held_out = (open_source("python_stdlib", split, str(tmp_path)) for split in ("train", "validation"))
    assert len(open_source("python_stdlib", "train[:10]", str(tmp_path))) == 10
    assert train.fingerprint != held_out.fingerprint
    assert isinstance(train[0], bytes)
    with pytest.raises(ValueError, match=r"^split: got 'test'; needs one of train, validation of python_stdlib"):
        open_source("python_stdlib", "test", str(tmp_path))
