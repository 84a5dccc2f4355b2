"""Double sparsity with three channels of eight, every token as a row of its own that has read up to it."""

from functools import partial

import numpy as np

from effattn_jax.sparse.double_sparsity import append_labels, double_sparsity, init_labels
from effattn_jax.sparse.paged_cache import init_paged_cache
from tests.sparse.mechanism import Mechanism
from tests.sparse.prefixes import as_rows, from_rows

CHANNELS = np.array([[5, 0, 3], [1, 6, 7]])


def heavy_of_row(q, k, channels, heavy):
    """Of one row q [H, K], k [n, G, K]: a list for each head, highest first."""
    heads, groups = len(q), k.shape[1]
    result = []
    for h in range(heads):
        g = h * groups // heads
        score = [sum(q[h, c] * k[j, g, c] for c in channels[g]) for j in range(len(k))]
        result.append(sorted(range(len(k)), key=lambda j: (-score[j], j))[:heavy])
    return result


def _mask(q, k, heavy):
    (batch, length, heads, _), keys = q.shape, k.shape[1]
    mask = np.zeros((batch, heads, length, keys), bool)
    for b, t in np.ndindex(batch, length):
        for h, tokens in enumerate(heavy_of_row(q[b, t], k[b, : t + 1], CHANNELS, heavy)):
            mask[b, h, t, tokens] = True
    return mask


def _run(q, k, v, heavy):
    queries, keys, values, lengths = as_rows(q, k, v)
    channels = np.repeat(CHANNELS, k.shape[2] // len(CHANNELS), axis=0)
    pages = -(-k.shape[1] // 4)
    rows = len(lengths)
    cache = init_paged_cache(rows, rows * pages, pages, *k.shape[2:], v.shape[3], page_size=4, dtype=k.dtype)
    cache, labels = append_labels(cache, init_labels(cache, channels), channels, keys, values, lengths)
    return from_rows(double_sparsity(queries, cache, labels, channels, heavy=heavy), q)


RECORDS = [
    Mechanism(
        "double sparsity",
        partial(_run, heavy=7),
        partial(_mask, heavy=7),
        dense=partial(_run, heavy=1000),
        lengths=(1, 7, 8, 37),
        trainable=False,
        packed=False,
        continues=False,
        count=lambda length: min(length, 7),
        slow=True,
    )
]
