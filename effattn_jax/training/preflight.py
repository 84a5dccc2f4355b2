"""Checks before the first step, so that a run does not fail hours later for a reason known now."""

import math
import os
import shutil
import tempfile
from typing import Any

import jax

from effattn_jax.checks import fail


def checkpoint_bytes(abstract_state: Any) -> int:
    """Size of the arrays (or jax.ShapeDtypeStruct) of a state, uncompressed."""
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(abstract_state))


def check_workdir(path: str, bytes_needed: int = 0) -> None:
    """The directory exists or can be made, takes a file, and has room for `bytes_needed`, else ValueError.

    A run that keeps n checkpoints needs room for n + 1: the oldest goes only after the newest is complete.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        fail("workdir", f"{path} ({error.strerror})", "a directory that can be made and written to")
    free = shutil.disk_usage(path).free
    if free < bytes_needed:
        fail("workdir", f"{path} with {human_bytes(free)} free", f"{human_bytes(bytes_needed)} for checkpoints")


def check_batch(batch_size: int, data_shards: int, accumulation: int = 1, process_count: int = 1) -> None:
    """A batch splits evenly over the accumulated steps, each of those over the shards, and all over the processes."""
    for name, value in (
        ("batch_size", batch_size),
        ("data_shards", data_shards),
        ("accumulation", accumulation),
        ("process_count", process_count),
    ):
        if value < 1:
            fail(name, value, "at least 1")
    unit = math.lcm(data_shards * accumulation, process_count)
    if batch_size % unit:
        why = f"{data_shards} data shards, {accumulation} accumulated steps, {process_count} processes"
        fail("batch_size", batch_size, f"a multiple of {unit} ({why})")


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
