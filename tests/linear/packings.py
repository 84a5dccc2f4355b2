"""Packed rows [2, 196]: ids of documents that end in, at and across chunks of 64; negative ids are padding."""

import numpy as np


def row(*runs):
    """(id, tokens), ... -> the ids of one row."""
    return np.concatenate([np.full(tokens, document, np.int32) for document, tokens in runs])


PACKINGS = {
    "straddling": np.stack([row((0, 50), (1, 100), (2, 46)), row((3, 63), (4, 2), (5, 131))]),
    "at chunk ends": np.stack([row((0, 64), (1, 64), (2, 68)), row((0, 128), (1, 68))]),
    "one token": np.stack(
        [row((0, 1), (1, 1), (2, 61), (3, 1), (4, 1), (5, 130), (6, 1)), np.arange(196, dtype=np.int32)]
    ),
    "empty documents": np.stack([row((2, 70), (5, 1), (9, 125)), row((0, 195), (7, 1))]),
    "padding": np.stack([row((-1, 70), (1, 20), (-2, 75), (1, 5), (4, 6), (-1, 20)), row((-1, 196))]),
    "padding between": np.stack([row((0, 64), (-1, 64), (0, 68)), row((0, 30), (-1, 100), (1, 66))]),
}
