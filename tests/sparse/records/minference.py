"""MInference: columns and diagonals, and the blocks of the highest means."""

from functools import partial

import numpy as np

from effattn_jax.sparse.minference import minference
from effattn_jax.sparse.vertical_slash import VerticalSlash
from tests.sparse.mechanism import Mechanism

SIZE = 8
SLASHES = VerticalSlash(3, 3, last_queries=4, forced_columns=1, forced_diagonals=1, least_vertical=1, least_slash=1)


def last_rows(q, k, last, scale=None):
    """{position: weights of the keys up to it} of the last queries; q [T, K], k [M, K]."""
    scale = q.shape[1] ** -0.5 if scale is None else scale
    rows = {}
    for i in range(max(0, len(q) - last), len(q)):
        position = len(k) - len(q) + i
        s = scale * k[: position + 1] @ q[i]
        rows[position] = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
    return rows


def highest(score, count):
    """Of equal ones the first."""
    return sorted(range(len(score)), key=lambda n: (-score[n], n))[:count]


def lines(q, k, pattern=SLASHES, scale=None):
    """Columns and diagonals of one head."""
    columns, diagonals = np.zeros(len(k)), np.zeros(len(k))
    for position, weights in last_rows(q, k, pattern.last_queries, scale).items():
        for j, weight in enumerate(weights):
            columns[j] += weight
            diagonals[position - j] += weight
    columns[: pattern.forced_columns] = np.inf
    diagonals[: pattern.forced_diagonals] = np.inf
    return highest(columns, pattern.vertical), highest(diagonals, pattern.slash)


def block_mask(q, k, of_head, size=SIZE, query_size=None):
    """[B, H, T, M] of `of_head(q [T, K], k [M, K])`, a set of blocks of keys for each block of queries."""
    (batch, length, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    mask = np.zeros((batch, heads, length, keys), bool)
    for b, h in np.ndindex(batch, heads):
        for i, blocks in enumerate(of_head(q[b, :, h], k[b, :, h * groups // heads])):
            for t in range(i * (query_size or size), min((i + 1) * (query_size or size), length)):
                for j in range(keys - length + t + 1):
                    mask[b, h, t, j] = j // size in blocks
    return mask


def slash_mask(q, k):
    def tiles(q, k):
        _, diagonals = lines(q, k)
        for i in range(0, len(q), SIZE):
            first = len(k) - len(q) + i
            yield {(first - d + row) // SIZE for d in diagonals for row in range(SIZE)}

    mask = block_mask(q, k, tiles)
    (batch, length, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    for b, h, t in np.ndindex(batch, heads, length):
        columns, _ = lines(q[b, :, h], k[b, :, h * groups // heads])
        mask[b, h, t, [c for c in columns if c <= keys - length + t]] = True
    return mask


def means(x, size):
    return [x[i : i + size].mean(0) for i in range(0, len(x), size)]


def top_mask(q, k, topk):
    def blocks(q, k):
        before = (len(k) - len(q)) // SIZE
        for i, mean in enumerate(means(q, SIZE)):
            yield highest([mean @ other for other in means(k, SIZE)[: before + i + 1]], topk)

    return block_mask(q, k, blocks)


def _run(q, k, v, pattern):
    return minference(q, k, v, pattern, block_size=SIZE)


FIELDS = {
    "lengths": (1, 8, 9, 37),
    "causal": False,
    "trainable": False,
    "packed": False,
    "continues": False,
    "shared": False,
}

RECORDS = [
    Mechanism(
        "minference lines",
        partial(_run, pattern=SLASHES),
        slash_mask,
        dense=partial(_run, pattern=SLASHES._replace(vertical=100)),
        **FIELDS,
    ),
]
