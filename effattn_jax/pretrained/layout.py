"""How parameters lie in a tensor of a published file. A layout knows both ways and moves numbers only, never rounds."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
Arrays = list[np.ndarray]


class Layout(NamedTuple):
    """Args:
    shape: of the tensor, from the shapes of its parameters.
    split: the parameters in a tensor, given their shapes.
    join: the tensor of parameters; the inverse.
    """

    shape: Callable[[Sequence[Shape]], Shape]
    split: Callable[[np.ndarray, Sequence[Shape]], Arrays]
    join: Callable[[Arrays], np.ndarray]


def _ends(sizes: Sequence[int]) -> list[int]:
    return [int(end) for end in np.cumsum(sizes)[:-1]]


SAME = Layout(
    shape=lambda shapes: (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else (),
    split=lambda tensor, shapes: np.split(tensor, _ends([s[0] for s in shapes])) if len(shapes) > 1 else [tensor],
    join=lambda arrays: np.concatenate(arrays) if len(arrays) > 1 else arrays[0],
)
"""As they are; several one after the other along the first axis."""

ROWS = Layout(
    shape=lambda shapes: (sum(s[1] for s in shapes), shapes[0][0]),
    split=lambda tensor, shapes: [part.T for part in np.split(tensor, _ends([s[1] for s in shapes]))],
    join=lambda arrays: np.concatenate([x.T for x in arrays]),
)
"""Kernels [in, out] as torch's Linear keeps them, [out, in]; several one below the other."""

TAPS = Layout(
    shape=lambda shapes: (sum(s[1] for s in shapes), 1, shapes[0][0]),
    split=lambda tensor, shapes: [part[:, 0].T for part in np.split(tensor, _ends([s[1] for s in shapes]))],
    join=lambda arrays: np.concatenate([x.T[:, None] for x in arrays]),
)
"""Taps [width, channels] as torch's depthwise Conv1d keeps them, [channels, 1, width]."""


def head_rows(heads: int) -> Layout:
    """As `ROWS`, but head by head: the rows of all kernels for the first head, then those for the second, ..."""

    def split(tensor: np.ndarray, shapes: Sequence[Shape]) -> Arrays:
        rows = tensor.reshape(heads, -1, tensor.shape[-1])
        parts = np.split(rows, _ends([s[1] // heads for s in shapes]), axis=1)
        return [part.reshape(-1, tensor.shape[-1]).T for part in parts]

    def join(arrays: Arrays) -> np.ndarray:
        rows = [x.T.reshape(heads, -1, x.shape[0]) for x in arrays]
        return np.concatenate(rows, axis=1).reshape(-1, arrays[0].shape[0])

    return Layout(ROWS.shape, split, join)


def head_channels(heads: int) -> Layout:
    """Vectors (biases) in the order of `head_rows`."""

    def split(tensor: np.ndarray, shapes: Sequence[Shape]) -> Arrays:
        parts = np.split(tensor.reshape(heads, -1), _ends([s[0] // heads for s in shapes]), axis=1)
        return [part.reshape(-1) for part in parts]

    def join(arrays: Arrays) -> np.ndarray:
        return np.concatenate([x.reshape(heads, -1) for x in arrays], axis=1).reshape(-1)

    return Layout(SAME.shape, split, join)


def shaped(shape: Callable[[Shape], Shape]) -> Layout:
    """One parameter, the same numbers in another shape: `shape` gives the tensor's from the parameter's."""
    return Layout(
        shape=lambda shapes: shape(shapes[0]),
        split=lambda tensor, shapes: [tensor.reshape(shapes[0])],
        join=lambda arrays: arrays[0].reshape(shape(arrays[0].shape)),
    )


FLAT = shaped(lambda shape: (math.prod(shape),))
"""[H, K] as [H K]."""

TRANSPOSED = Layout(
    shape=lambda shapes: tuple(reversed(shapes[0])),
    split=lambda tensor, shapes: [tensor.T],
    join=lambda arrays: arrays[0].T,
)
"""One parameter with its axes in the other order."""


def stacked(between: Shape = ()) -> Layout:
    """Parameters of one shape along a new first axis, and axes of size 1 (`between`) after it."""
    return Layout(
        shape=lambda shapes: (len(shapes), *between, *shapes[0]),
        split=lambda tensor, shapes: list(tensor.reshape(len(shapes), *shapes[0])),
        join=lambda arrays: np.stack(arrays).reshape(len(arrays), *between, *arrays[0].shape),
    )


STACKED = stacked()

INTERLEAVED = Layout(
    shape=lambda shapes: (*shapes[0][:-1], sum(s[-1] for s in shapes)),
    split=lambda tensor, shapes: [tensor[..., i :: len(shapes)] for i in range(len(shapes))],
    join=lambda arrays: np.stack(arrays, axis=-1).reshape(*arrays[0].shape[:-1], -1),
)
"""Parameters of one shape by turns along the last axis: the first channel of each, the second, ... (gpt-oss)."""
