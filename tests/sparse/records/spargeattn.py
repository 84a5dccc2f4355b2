"""SpargeAttn with blocks of queries that are twice those of keys, some of which are not alike."""

from functools import partial

import numpy as np

from effattn_jax.sparse.spargeattn import spargeattn
from tests.sparse.mechanism import Mechanism
from tests.sparse.records.minference import block_mask, highest, means

QUERIES, KEYS = 8, 4


def alike(x):
    lengths = [np.linalg.norm(a) or np.inf for a in x]  # a zero is like nothing
    return np.mean([a @ b / m / n for a, m in zip(x, lengths, strict=True) for b, n in zip(x, lengths, strict=True)])


def blocks(q, k, similarity, topk=None, mass=None):
    """The sets of the blocks of queries of one head."""
    before, total = len(k) - len(q), -(-len(k) // KEYS)
    k = k - k.mean(0)
    fixed = {j for j in range(total) if alike(k[j * KEYS : (j + 1) * KEYS]) < similarity}
    for i, mean in enumerate(means(q, QUERIES)):
        first, last = before + i * QUERIES, min(before + (i + 1) * QUERIES, len(k)) - 1
        past = {j for j in range(total) if j * KEYS <= last}
        own = {j for j in past if (j + 1) * KEYS > first}
        if alike(q[i * QUERIES : (i + 1) * QUERIES]) < similarity:
            yield past
            continue
        free = sorted(past - fixed)
        s = np.array([mean @ means(k, KEYS)[j] / np.sqrt(q.shape[1]) for j in free])
        p = np.exp(s - s.max(initial=0)) / np.exp(s - s.max(initial=0)).sum()
        if topk is not None:
            chosen = {free[n] for n in highest(p, int(np.ceil(topk * total)))}
        else:
            chosen, held = set(), 0.0
            for n in highest(p, len(p)):
                if held < mass:
                    chosen.add(free[n])
                held += p[n]
        yield chosen | own | (fixed & past)


def _run(q, k, v, **options):
    return spargeattn(q, k, v, query_block=QUERIES, block_size=KEYS, **options)


OPTIONS = {"topk": 0.3, "similarity": 0.2}

RECORDS = [
    Mechanism(
        "spargeattn",
        partial(_run, **OPTIONS),
        lambda q, k: block_mask(q, k, partial(blocks, **OPTIONS), KEYS, QUERIES),
        dense=partial(_run, topk=0.3, similarity=1.1),
        lengths=(1, 8, 9, 37),
        causal=False,
        trainable=False,
        packed=False,
        continues=False,
        shared=False,
    )
]
