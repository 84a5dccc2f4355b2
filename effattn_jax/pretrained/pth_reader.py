"""Tensors of a file that `torch.save` wrote, without torch and without running what is in it."""

import math
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.pretrained.state_dict import View, state_dict
from effattn_jax.pretrained.tensors import TensorInfo

NUMPY: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
LONGEST_PICKLE = 64 << 20  # bytes; that of a model of 100,000 tensors has 20 MB
LOCAL_HEADER = struct.Struct("<26xHH")  # sizes of the name and of the extra field that follow it
LOCAL_SIGNATURE = b"PK\x03\x04"
ENCRYPTED = 1


class PthReader:
    """A zip archive of a pickle, data.pkl, and of an entry data/KEY for each storage, all of them uncompressed.

    The pickle is interpreted, not run, see `state_dict`. When the file is opened it is checked that every tensor lies
    inside of its storage and every storage inside of the file; a checksum when all of a storage is read.

    Raises:
      ValueError: no such archive (the format before torch 1.6 is none); compressed or encrypted entries; a pickle of
        anything but a dictionary of tensors; sizes that do not fit; numbers that are not little-endian.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            checks.fail(path.name, f"{type(error).__name__}: {error}", "an undamaged zip archive, as torch.save writes")
        pickles = [name for name in entries if name.count("/") <= 1 and pathlib.PurePosixPath(name).name == "data.pkl"]
        if len(pickles) != 1:
            checks.fail(path.name, f"{len(pickles)} entries data.pkl", "one, as torch.save writes")
        self._root, self._entries = pickles[0].removesuffix("data.pkl"), entries
        self._size = path.stat().st_size
        with path.open("rb") as file:
            self._check_byteorder(file)
            self._views = state_dict(self._small(file, "data.pkl", LONGEST_PICKLE), f"{path.name}: data.pkl")
            for name, view in self._views.items():
                self._check(file, name, view)
        self.tensors = {name: TensorInfo(view.shape, view.storage.dtype) for name, view in self._views.items()}

    def read(self, names: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        """The named tensors in the order in which they lie in the file, each read when it is asked for.

        A tensor that is not contiguous comes as a view of the numbers it spans.
        """
        wanted = sorted((name for name in self._views if name in names), key=self._place)
        with self._path.open("rb") as file:
            for name in wanted:
                yield name, self._tensor(file, self._views[name])

    def _place(self, name: str) -> tuple[int, int]:
        view = self._views[name]
        return self._entry(f"data/{view.storage.key}").header_offset, view.offset

    def _tensor(self, file: BinaryIO, view: View) -> np.ndarray:
        dtype, count = np.dtype(NUMPY[view.storage.dtype]), _span(view)
        entry = self._entry(f"data/{view.storage.key}")
        file.seek(self._start(file, entry) + view.offset * dtype.itemsize)
        numbers = np.fromfile(file, np.uint8, count * dtype.itemsize)
        if numbers.size != count * dtype.itemsize:
            checks.fail(entry.filename, f"{numbers.size} bytes", f"{count * dtype.itemsize}")
        if numbers.size == entry.file_size and zlib.crc32(numbers) != entry.CRC:
            checks.fail(f"{self._path.name}: {entry.filename}", "a wrong checksum", "undamaged numbers")
        strides = [stride * dtype.itemsize for stride in view.strides]
        return np.lib.stride_tricks.as_strided(numbers.view(dtype), view.shape, strides, writeable=False)

    def _check(self, file: BinaryIO, name: str, view: View) -> None:
        """That the tensor lies in its storage, and the storage in the file."""
        storage, what = view.storage, f"{self._path.name}: {name}"
        entry = self._entry(f"data/{storage.key}")
        self._start(file, entry)
        nbytes = storage.size * np.dtype(NUMPY[storage.dtype]).itemsize
        if entry.file_size != nbytes:
            checks.fail(what, f"{entry.filename} of {entry.file_size} bytes", f"{storage.size} {storage.dtype}")
        if view.offset + _span(view) > storage.size:
            checks.fail(
                what,
                f"offset {view.offset}, shape {view.shape}, strides {view.strides}",
                f"a place inside of the {storage.size} numbers of {entry.filename}",
            )

    def _entry(self, name: str) -> zipfile.ZipInfo:
        entry = self._entries.get(self._root + name)
        if entry is None:
            checks.fail(self._path.name, f"no entry {self._root + name}", "one")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            checks.fail(f"{self._path.name}: {entry.filename}", "a compressed entry", "numbers as they are")
        if entry.flag_bits & ENCRYPTED:
            checks.fail(f"{self._path.name}: {entry.filename}", "an encrypted entry", "numbers as they are")
        return entry

    def _start(self, file: BinaryIO, entry: zipfile.ZipInfo) -> int:
        """Where the bytes of an entry begin: after its own header, which may differ from that in the directory."""
        file.seek(max(entry.header_offset, 0))
        header = file.read(LOCAL_HEADER.size)
        if entry.header_offset < 0 or len(header) < LOCAL_HEADER.size or header[:4] != LOCAL_SIGNATURE:
            checks.fail(f"{self._path.name}: {entry.filename}", f"no entry at byte {entry.header_offset}", "one there")
        start = entry.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header))
        if start + entry.file_size > self._size:
            checks.fail(
                f"{self._path.name}: {entry.filename}", f"an end at byte {start + entry.file_size}", f"<= {self._size}"
            )
        return start

    def _small(self, file: BinaryIO, name: str, longest: int) -> bytes:
        entry = self._entry(name)
        if entry.file_size > longest:
            checks.fail(f"{self._path.name}: {entry.filename}", f"{entry.file_size} bytes", f"at most {longest}")
        file.seek(self._start(file, entry))
        data = file.read(entry.file_size)
        if zlib.crc32(data) != entry.CRC:
            checks.fail(f"{self._path.name}: {entry.filename}", "a wrong checksum", "undamaged data")
        return data

    def _check_byteorder(self, file: BinaryIO) -> None:
        if f"{self._root}byteorder" in self._entries:
            order = self._small(file, "byteorder", 16)
            if order != b"little":
                checks.fail(f"{self._path.name}: byteorder", repr(order), "little")


def _span(view: View) -> int:
    """Numbers from the first to the last of a tensor."""
    if not math.prod(view.shape):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
