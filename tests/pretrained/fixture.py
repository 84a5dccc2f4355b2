"""Tiny random models of public implementations: what they compute, and a comparison that shares nothing with ours."""

import json
import pathlib
from typing import NamedTuple

import numpy as np

FOLDER = pathlib.Path(__file__).parent.parent / "fixtures" / "models"


class Fixture(NamedTuple):
    path: pathlib.Path
    config: dict
    io: dict  # input_ids, logits, gen_ids; of some pad_input_ids, pad_mask, pad_logits, long_ids, long_logits
    tensors: dict  # published names and shapes


def fixture(name):
    path = FOLDER / name
    with np.load(path / "io.npz") as io:
        return Fixture(path, json.loads((path / "config.json").read_text()), dict(io), header(path))


def header(path):
    """Shapes of the tensors in a directory: eight bytes with the length of the JSON, then it; file by file."""
    shapes = {}
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as f:
            entries = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        entries.pop("__metadata__", None)
        shapes |= {name: tuple(entry["shape"]) for name, entry in entries.items()}
    return shapes


def raw(path):
    """Name -> bytes of every tensor in a directory."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                low, high = entry["data_offsets"]
                found[name] = data[start + low : start + high]
    return found
