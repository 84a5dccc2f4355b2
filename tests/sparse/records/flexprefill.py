"""FlexPrefill with a distance that some heads are below and some above."""

from functools import partial

import numpy as np

from effattn_jax.sparse.flexprefill import flexprefill
from tests.sparse.mechanism import Mechanism
from tests.sparse.records.minference import SIZE, block_mask, highest, last_rows, means

OPTIONS = {"gamma": 0.7, "tau": 0.19, "min_budget": SIZE}


def softmax(s):
    e = np.exp(np.array(s) - np.max(s))
    return e / e.sum()


def marginals(q, k):
    """Mass of columns and of diagonals of one head."""
    columns, diagonals = np.zeros(len(k)), np.zeros(len(k))
    rows = last_rows(q, k, SIZE)
    for weights in rows.values():
        columns[: len(weights)] += weights / len(rows)
        diagonals[: len(weights)] += weights[::-1] / len(rows)
    return columns, diagonals


def bins(x):
    return [x[i : i + SIZE].sum() for i in range(0, len(x), SIZE)]


def blocks_for(mass, gamma):
    total, tokens = 0.0, 0
    for x in sorted(mass, reverse=True):
        total += x
        tokens += total <= gamma
    return (tokens + 1) // SIZE + 1


def divergence(a, v):
    kl = lambda x: sum(p * np.log(p / ((r + s) / 2)) for p, r, s in zip(x, a, v, strict=True))  # noqa: E731
    return np.sqrt((kl(a) + kl(v)) / 2)


def by_means(q, k, tau):
    """Whether the head chooses by means."""
    predicted = softmax([q[-SIZE:].mean(0) @ mean / np.sqrt(q.shape[1]) for mean in means(k, SIZE)])
    return divergence(predicted, bins(marginals(q, k)[0])) < tau


def blocks(q, k, gamma, tau, min_budget, max_budget=None):
    """The sets of the blocks of queries of one head."""
    count, total = -(-len(q) // SIZE), -(-len(k) // SIZE)
    before = total - count
    columns, diagonals = marginals(q, k)
    least = min(total, -(-min_budget // SIZE))
    most = total if max_budget is None else max(least, max_budget // SIZE)
    sizes = [min(max(blocks_for(x, gamma), least), most) for x in (columns, diagonals)]
    aware = by_means(q, k, tau)
    if aware:
        sizes = [least, least]
    column_bins, diagonal_bins = bins(columns), bins(diagonals[::-1])
    column_bins[0] = diagonal_bins[-1] = np.inf
    chosen = highest(column_bins, sizes[0])
    back = [total - 1 - n for n in highest(diagonal_bins, sizes[1])]
    result = [{j for j in range(before + i + 1) if j in chosen or before + i - j in back} for i in range(count)]
    if aware:
        p = np.zeros((count, total))
        for i, mean in enumerate(means(q, SIZE)):
            p[i, : before + i + 1] = softmax(
                [mean @ other / np.sqrt(q.shape[1]) for other in means(k, SIZE)[: before + i + 1]]
            )
        held = 0.0
        for n in highest(p.reshape(-1), p.size):
            held += p.reshape(-1)[n]
            i, j = divmod(n, total)
            if held <= gamma * count and j <= before + i:
                result[i].add(j)
    return result


def _mask(q, k):
    if k.shape[1] <= 2 * SIZE:  # short rows read everything
        return block_mask(q, k, lambda q, k: [{0, 1}] * 2)
    return block_mask(q, k, partial(blocks, **OPTIONS))


def _run(q, k, v, **options):
    return flexprefill(q, k, v, block_size=SIZE, **OPTIONS | options)


RECORDS = [
    Mechanism(
        "flexprefill",
        _run,
        _mask,
        dense=partial(_run, gamma=1.001, tau=0.0),
        lengths=(1, 8, 9, 37),
        causal=False,
        trainable=False,
        packed=False,
        continues=False,
        shared=False,
    )
]
