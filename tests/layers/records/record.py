"""One entry of the catalogue of layers."""

from typing import Any, NamedTuple

BATCH, DIM = 2, 16


class Record(NamedTuple):
    """A layer and its options at model dimension DIM."""

    layer: Any
    options: dict
    slow: bool = False  # another layout of a layer that is listed too
    idle: tuple[str, ...] = ()  # beginnings of names of parameters without effect in a layer that stands alone
    chooses: bool = False  # reads what scores choose
