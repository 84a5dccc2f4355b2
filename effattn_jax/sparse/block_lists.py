"""The blocks of keys that blocks of queries read under a mask, from the classes of its tiles: numpy, at trace time."""

from typing import NamedTuple

import numpy as np

from effattn_jax.sparse.masks import EMPTY, PARTIAL, Mask

TILES = 2**20  # classified at once
LONG, PIECES = 4, 8  # times the usual length of a list; the most pieces that lists are cut into


class Lists(NamedTuple):
    blocks: np.ndarray  # [N, n], ascending; -1 is none
    partial: bool  # some of the tiles need the mask itself


def block_lists(mask: Mask, first: int, queries: int, keys: int, query_block: int, block_size: int) -> Lists:
    """Of queries at positions first, first + 1, ..., `query_block` to a list, over keys at positions 0..keys - 1."""
    begins = first + np.arange(0, queries, query_block)
    ends = np.minimum(begins + query_block, first + queries) - 1
    starts = np.arange(0, keys, block_size)
    stops = np.minimum(starts + block_size, keys) - 1
    rows: list[np.ndarray] = []
    partial = False
    step = max(1, TILES // max(1, len(starts)))
    for i in range(0, len(begins), step):
        classes = mask.tiles(begins[i : i + step, None], ends[i : i + step, None], starts[None], stops[None])
        partial |= bool(np.any(classes == PARTIAL))
        rows += [np.flatnonzero(row) for row in classes != EMPTY]
    longest = max([1, *map(len, rows)])
    blocks = np.full((len(rows), longest), -1, np.int32)
    for row, listed in zip(blocks, rows, strict=True):
        row[: len(listed)] = listed
    return Lists(blocks, partial)


def runs(blocks: np.ndarray) -> list[np.ndarray]:
    """The rows of [N, L, n] cut where long lists begin and end, each piece as wide as its longest list.

    A few rows that read everything would make all lists as long, and let the rows beside them wait. Not cut where that
    would make many pieces.
    """
    sizes = np.max(np.sum(blocks >= 0, axis=-1), axis=-1)
    long = sizes > LONG * max(1, np.median(sizes))
    cuts = np.flatnonzero(long[1:] != long[:-1]) + 1
    if len(cuts) >= PIECES:
        cuts = cuts[:0]
    pieces = np.split(blocks, cuts)
    return [piece[..., : max(1, np.max(np.sum(piece >= 0, axis=-1)))] for piece in pieces]
