"""Tensors of `.pth` files, and the files that are refused."""

import builtins
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from effattn_jax.pretrained import pth_reader
from effattn_jax.pretrained.pth_reader import PthReader
from tests.pretrained import pth
from tests.pretrained.fixture import FOLDER

NUMBERS = np.arange(24, dtype=np.float32)


def read(path):
    reader = PthReader(path)
    return dict(reader.read(reader.tensors))


def one_tensor(path, offset=0, shape=(4, 6), strides=(6, 1), *, size=24, data=NUMBERS, **options):
    value = pth.tensor(pth.storage("FloatStorage", "0", size), offset, shape, strides)
    return pth.archive(path, pth.pickle(pth.dictionary({"x": value})), [data], **options)


@pytest.mark.parametrize("dtype", pth.STORAGES, ids=str)
def test_numbers_of_every_kind(dtype, tmp_path):
    given = {"a": np.arange(6).reshape(2, 3).astype(dtype), "b.c": np.arange(1, 3).astype(dtype)}
    got = read(pth.write(tmp_path / "x.pth", given))
    assert list(got) == ["a", "b.c"]
    for name, x in given.items():
        assert got[name].dtype == dtype
        np.testing.assert_array_equal(got[name], x)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (2, 1, 3)], ids=str)
def test_shapes(shape, tmp_path):
    given = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    path = pth.write(tmp_path / "x.pth", {"x": given})
    assert PthReader(path).tensors == {"x": (shape, "F32")}
    np.testing.assert_array_equal(read(path)["x"], given)


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "want"),
    [
        (0, (6, 4), (1, 6), NUMBERS.reshape(4, 6).T),
        (7, (2, 3), (6, 1), NUMBERS.reshape(4, 6)[1:3, 1:4]),
        (3, (2, 2), (0, 1), np.float32([[3, 4], [3, 4]])),
        (23, (1, 1), (99, 99), np.float32([[23]])),
    ],
    ids=["turned", "part", "repeated", "last"],
)
def test_tensors_that_are_not_contiguous(offset, shape, strides, want, tmp_path):
    np.testing.assert_array_equal(read(one_tensor(tmp_path / "x.pth", offset, shape, strides))["x"], want)


def test_two_tensors_in_a_storage(tmp_path):
    place = pth.storage("FloatStorage", "0", 24)
    items = {"whole": pth.tensor(place, 0, [24], [1]), "end": pth.tensor(place, 20, [4], [1])}
    got = read(pth.archive(tmp_path / "x.pth", pth.pickle(pth.dictionary(items)), [NUMBERS]))
    np.testing.assert_array_equal(got["whole"], NUMBERS)
    np.testing.assert_array_equal(got["end"], NUMBERS[20:])


def test_file_of_torch():
    """Written by torch 2.13."""
    got = read(FOLDER.parent / "pth" / "torch.pth")
    count = lambda *shape: np.arange(np.prod(shape)).reshape(shape)  # noqa: E731
    want = {
        "f32": count(3, 4).astype(np.float32),
        "bf16": count(5, 2).astype(ml_dtypes.bfloat16),
        "f16": count(7).astype(np.float16),
        "f64": count(2, 2).astype(np.float64),
        "i64": count(5),
        "turned": count(4, 3).T.astype(np.float32),
        "part": count(10, 6)[2:5, 1:4].astype(np.float32),
        "whole": count(10, 6).astype(np.float32),
        "repeated": np.repeat(count(1, 3), 4, axis=0).astype(np.float32),
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float32),
    }
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype
        np.testing.assert_array_equal(got[name], x)


def test_a_tensor_is_read_when_it_is_asked_for(tmp_path):
    path = pth.write(tmp_path / "x.pth", {name: NUMBERS + i for i, name in enumerate("abc")})
    reader = PthReader(path)
    tensors = reader.read({"c", "b"})
    assert next(tensors)[0] == "b"
    path.write_bytes(path.read_bytes().replace((NUMBERS + 2).tobytes(), NUMBERS.tobytes()))
    with pytest.raises(ValueError, match="archive/data/2: got a wrong checksum"):
        next(tensors)


class Evil:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("function", [os.system, builtins.eval, os.mkdir], ids=lambda f: f.__name__)
def test_what_a_pickle_calls_is_not_called(function, protocol, tmp_path):
    made = tmp_path / "made"
    argument = {"eval": f"__import__('os').mkdir({str(made)!r})", "system": f"mkdir {made}", "mkdir": str(made)}
    evil = pickle.dumps({"x": Evil(function, argument[function.__name__])}, protocol)
    pickle.loads(evil)
    assert made.is_dir()  # so it would have run
    made.rmdir()
    path = pth.archive(tmp_path / "x.pth", evil)
    with pytest.raises(ValueError, match=rf"x.pth: data.pkl: got \w+\.{function.__name__}; needs"):
        PthReader(path)
    assert not made.exists()


X = pth.text("x")
ONE = pth.storage("FloatStorage", "0", 24)
DICTIONARY = pth.name("collections", "OrderedDict")
TUPLE = pth.tuple_of(pth.text("collections"), pth.text("OrderedDict"))
REFUSED = {
    "a module": (pth.name("torch.nn.modules.linear", "Linear"), "torch.nn.modules.linear.Linear"),
    "a parameter": (pth.name("torch._utils", "_rebuild_parameter"), "torch._utils._rebuild_parameter"),
    "another storage": (pth.storage("QInt8Storage", "0", 24), "torch.QInt8Storage"),
    "INST": (b"(" + X + b"ios\nsystem\n", "opcode INST 'os system'"),
    "NEWOBJ": (DICTIONARY + b")\x81", "opcode NEWOBJ"),
    "an extension": (b"\x82\x01", "opcode EXT1 1"),
    "a call of a tuple": (pth.call(TUPLE), "a call of a tuple"),
    "a call of a storage": (pth.call(pth.name("torch", "FloatStorage"), pth.number(1)), "a call of torch.FloatStorage"),
    "a filled dictionary": (pth.call(DICTIONARY, pth.tuple_of()), "a call of collections.OrderedDict with a tuple"),
    "attributes of a name": (DICTIONARY + pth.dictionary({"y": X}) + b"b", "attributes of collections.OrderedDict"),
    "attributes": (pth.dictionary({}) + pth.dictionary({"y": X}) + b"b", "attributes of a dict"),
    "a key that is no text": (b"}" + pth.number(3) + X + b"s", "the key 3"),
    "an item of a tuple": (pth.tuple_of() + X + X + b"s", "an item of a tuple"),
    "another id": (pth.tuple_of(pth.text("module"), X) + pth.PERSISTENT_ID, "the persistent id a tuple"),
    "a negative size": (pth.storage("FloatStorage", "0", -1), "a size of -1"),
    "a negative stride": (pth.tensor(ONE, 23, [24], [-1]), "a size of -1"),
    "strides of another rank": (pth.tensor(ONE, 0, [24], [1, 1]), r"a tensor of shape a tuple with strides a tuple"),
    "hooks": (pth.tensor(ONE, 0, [24], [1], hooks=pth.dictionary({"y": X})), "a tensor with hooks"),
    "no storage": (pth.tensor(X, 0, [24], [1]), "a tensor without a storage"),
    "a number": (pth.number(7), "7 under 'x'"),
    "a dictionary": (pth.dictionary({"y": pth.tensor(ONE, 0, [24], [1])}), "a dict under 'x'"),
}


@pytest.mark.parametrize(("value", "asked"), REFUSED.values(), ids=REFUSED)
def test_refused_pickles(value, asked, tmp_path):
    path = pth.archive(tmp_path / "x.pth", pth.pickle(pth.dictionary({"x": value})), [NUMBERS])
    with pytest.raises(ValueError, match=rf"x.pth: data.pkl: got {asked}.*; needs .*; it was not run"):
        PthReader(path)


def test_a_tensor_without_a_dictionary(tmp_path):
    with pytest.raises(ValueError, match="got a view on its own; needs"):
        PthReader(pth.archive(tmp_path / "x.pth", pth.pickle(pth.tensor(ONE, 0, [24], [1])), [NUMBERS]))


def test_nesting_without_end(tmp_path):
    """Neither recursion nor a hash of it."""
    deep = b"(" * 100_000 + b"t" * 100_000
    doubled = b")" + b"q\x00h\x00\x86" * 1000  # each a pair of the one before
    for value in (deep, doubled, b"}" + deep + X + b"s", b"}" + doubled + X + b"s"):
        with pytest.raises(ValueError, match=r"got (a tuple under 'x'|the key a tuple); needs"):
            PthReader(pth.archive(tmp_path / "x.pth", pth.pickle(pth.dictionary({"x": value}))))


@pytest.mark.parametrize("start", ["", "}", "(", "(t", "}(", "t", "u", "s", "\x86", "R", "b", "Q", "h\x07", "X\xff"])
def test_a_pickle_that_ends_early(start, tmp_path):
    path = pth.archive(tmp_path / "x.pth", b"\x80\x02" + start.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x.pth: data.pkl: got .*; needs an undamaged pickle"):
        PthReader(path)


def test_damaged_pickles_are_value_errors(tmp_path):
    """And nothing else, whatever byte is another."""
    place = pth.storage("FloatStorage", "0", 24)
    whole = pth.pickle(pth.dictionary({"a": pth.tensor(place, 0, [4, 6], [6, 1]), "b": pth.tensor(place, 1, [2], [1])}))
    rng, refused = np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(2, len(whole), rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        try:
            read(pth.archive(tmp_path / "x.pth", bytes(damaged), [NUMBERS]))
        except ValueError:
            refused += 1
    assert 100 < refused < 300


def test_a_truncated_file(tmp_path):
    path = one_tensor(tmp_path / "x.pth")
    whole = path.read_bytes()
    for length in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x.pth: got BadZipFile: .*; needs an undamaged zip archive"):
            PthReader(path)


def test_a_file_that_lost_its_middle(tmp_path):
    path = one_tensor(tmp_path / "x.pth")
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + whole[80:])
    with pytest.raises(ValueError, match=r"x\.pth"):
        PthReader(path)


@pytest.mark.parametrize("name", ["data.pkl", "data/0"])
def test_a_compressed_entry(name, tmp_path):
    path = one_tensor(tmp_path / "x.pth", data=np.zeros(24, np.float32), compressed=[name])
    with pytest.raises(ValueError, match=f"x.pth: archive/{name}: got a compressed entry"):
        PthReader(path)


def patched(path, name, field, value):
    """The entry's record in the directory at the end of the archive, with another value."""
    at, kind = {"flags": (8, "<H"), "compressed size": (20, "<I"), "size": (24, "<I"), "offset": (42, "<I")}[field]
    data = bytearray(path.read_bytes())
    struct.pack_into(kind, data, data.rindex(name.encode()) - 46 + at, value)
    path.write_bytes(data)


def test_an_encrypted_entry(tmp_path):
    path = one_tensor(tmp_path / "x.pth")
    patched(path, "archive/data/0", "flags", 1)
    with pytest.raises(ValueError, match="archive/data/0: got an encrypted entry"):
        PthReader(path)


@pytest.mark.parametrize("offset", [1, 40, 1 << 20, (1 << 32) - 2])
def test_an_entry_that_lies_elsewhere(offset, tmp_path):
    path = one_tensor(tmp_path / "x.pth")
    patched(path, "archive/data/0", "offset", offset)
    with pytest.raises(ValueError, match=f"x.pth: archive/data/0: got no entry at byte {offset}"):
        PthReader(path)


def test_an_entry_beyond_the_end(tmp_path):
    path = one_tensor(tmp_path / "x.pth", size=10_000, shape=(10_000,), strides=(1,))
    for field in ("size", "compressed size"):
        patched(path, "archive/data/0", field, 40_000)
    with pytest.raises(ValueError, match="archive/data/0: got an end at byte 40"):
        PthReader(path)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(1, (4, 6), (6, 1)), (0, (5, 6), (6, 1)), (0, (4, 6), (7, 1)), (24, (1,), (1,)), (0, (2,), (1 << 30,))],
    ids=str,
)
def test_a_tensor_beyond_its_storage(offset, shape, strides, tmp_path):
    with pytest.raises(ValueError, match=rf"x.pth: x: got offset {offset}, .*; needs a place inside of the 24 numbers"):
        PthReader(one_tensor(tmp_path / "x.pth", offset, shape, strides))


@pytest.mark.parametrize("size", [0, 23, 25])
def test_a_storage_of_another_size(size, tmp_path):
    path = one_tensor(tmp_path / "x.pth", size=size, shape=(1,), strides=(1,))
    with pytest.raises(ValueError, match=rf"x.pth: x: got archive/data/0 of 96 bytes; needs {size} F32"):
        PthReader(path)


def test_a_storage_that_is_not_there(tmp_path):
    value = pth.tensor(pth.storage("FloatStorage", "7", 1), 0, [1], [1])
    with pytest.raises(ValueError, match=r"x.pth: got no entry archive/data/7"):
        PthReader(pth.archive(tmp_path / "x.pth", pth.pickle(pth.dictionary({"x": value}))))


def test_numbers_with_the_large_end_first(tmp_path):
    with pytest.raises(ValueError, match="byteorder: got b'big'; needs little"):
        PthReader(one_tensor(tmp_path / "x.pth", byteorder=b"big"))
    np.testing.assert_array_equal(read(one_tensor(tmp_path / "x.pth", byteorder=b"little"))["x"].ravel(), NUMBERS)


def test_an_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
        file.writestr("word/document.xml", "text")
    with pytest.raises(ValueError, match=r"x.pth: got 0 entries data.pkl"):
        PthReader(tmp_path / "x.pth")


def test_a_pickle_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(pth_reader, "LONGEST_PICKLE", 100)
    with pytest.raises(ValueError, match=r"archive/data.pkl: got \d+ bytes; needs at most 100"):
        PthReader(one_tensor(tmp_path / "x.pth"))
