"""What a reader of tensors is, and one that knows another's tensors by other names."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from effattn_jax import checks


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it


class Tensors(Protocol):
    tensors: dict[str, TensorInfo]

    def read(self, names: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        """The named tensors one by one, each read when it is asked for, in the order in which they are stored."""


class Renamed:
    """The tensors of `reader` under new names; those whose new name is None are left out.

    Raises:
      ValueError: two tensors get the same name.
    """

    def __init__(self, reader: Tensors, rename: Callable[[str], str | None]):
        self._reader, self._old = reader, dict[str, str]()
        for old in reader.tensors:
            new = rename(old)
            if new is None:
                continue
            if new in self._old:
                checks.fail("tensors", f"{self._old[new]} and {old}", "one of the two, they are the same tensor")
            self._old[new] = old
        self.tensors = {new: reader.tensors[old] for new, old in self._old.items()}

    def read(self, names: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        new = {self._old[name]: name for name in names}
        for old, tensor in self._reader.read(new):
            yield new[old], tensor
