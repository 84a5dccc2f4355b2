"""Tensors of a directory of safetensors files, one at a time."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from effattn_jax import checks
from effattn_jax.pretrained.tensors import TensorInfo

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64", "F32", "F16", "BF16"}


class SafetensorsReader:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names.

    A file's header is checked when it is opened, by the safetensors library: its size, its JSON, and that the tensors
    fill the file without gaps.

    Raises:
      ValueError: neither file is there; the index names a file that is missing or outside of the directory, or puts a
        tensor into another file than the one that has it; a file is damaged.
    """

    def __init__(self, directory: pathlib.Path):
        files = _files(directory)
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[str, pathlib.Path] = {}
        for path, expected in files.items():
            found = _header(path)
            if expected is not None and set(found) != expected:
                absent, extra = sorted(expected - set(found)), sorted(set(found) - expected)
                checks.fail(INDEX, f"other tensors than in {path.name}", f"one truth: absent {absent}, extra {extra}")
            for name, info in found.items():
                self.tensors[name], self._files[name] = info, path

    def read(self, names: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        """The named tensors file by file, each read when it is asked for."""
        for path in dict.fromkeys(path for name, path in self._files.items() if name in names):
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118, it is no mapping
                    if name in names:
                        yield name, file.get_tensor(name)


def _files(directory: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    """Paths, with the tensors the index promises in each."""
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            checks.fail("path", f"no {SINGLE} in {directory}", f"that file, or {INDEX} and the files it names")
        return {directory / SINGLE: None}
    try:
        places = json.loads(index.read_text())["weight_map"]
        promised: dict[str, set[str]] = {}
        for tensor, name in places.items():
            promised.setdefault(name, set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        checks.fail(INDEX, f"{type(error).__name__}: {error}", "JSON with a weight_map from tensors to files")
    for name in promised:
        if not isinstance(name, str) or pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
            checks.fail(INDEX, f"the file {name!r}", "names of .safetensors files beside it, no paths")
    missing = [name for name in promised if not (directory / name).is_file()]
    if missing:
        checks.fail(INDEX, f"files that are not there: {', '.join(sorted(missing))}", f"all files in {directory}")
    return {directory / name: tensors for name, tensors in sorted(promised.items())}


def _header(path: pathlib.Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(path, framework="np") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118, it is no mapping
                part = file.get_slice(name)
                found[name] = TensorInfo(tuple(part.get_shape()), part.get_dtype())
            return found
    except (SafetensorError, OSError) as error:
        checks.fail(path.name, f"{type(error).__name__}: {error}", "an undamaged safetensors file")
