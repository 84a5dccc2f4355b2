"""Quest, every token as a row of its own that has read up to it."""

from functools import partial

import numpy as np

from effattn_jax.sparse.paged_cache import init_paged_cache
from effattn_jax.sparse.quest import append_quest, init_quest, quest
from tests.sparse.mechanism import Mechanism
from tests.sparse.prefixes import as_rows, from_rows

PAGE = 4


def chosen(q, k, length, budget, force_last=True):
    """Of one row q [H, K], k [M, G, K]: {head: pages}."""
    count, heads = -(-length // PAGE), len(q)
    result = {}
    for h in range(heads):
        of_pages = [k[n * PAGE : min((n + 1) * PAGE, length), h * k.shape[1] // heads] for n in range(count)]
        bound = [sum(max(a * x.min(), a * x.max()) for a, x in zip(q[h], page.T, strict=True)) for page in of_pages]
        forced = [count - 1] if force_last else []
        free = sorted(set(range(count)) - set(forced), key=lambda n: (-bound[n], n))
        result[h] = (forced + free)[: budget // PAGE]
    return result


def _mask(q, k, budget):
    (batch, length, heads, _), keys = q.shape, k.shape[1]
    mask = np.zeros((batch, heads, length, keys), bool)
    for b, t in np.ndindex(batch, length):
        for h, pages in chosen(q[b, t], k[b], t + 1, budget).items():
            for n in pages:
                mask[b, h, t, n * PAGE : min((n + 1) * PAGE, t + 1)] = True
    return mask


def _run(q, k, v, budget):
    queries, keys, values, lengths = as_rows(q, k, v)
    pages = -(-k.shape[1] // PAGE)
    rows, groups = len(lengths), k.shape[2]
    sizes = (groups, k.shape[3], v.shape[3])
    cache = init_paged_cache(rows, rows * pages, pages, *sizes, page_size=PAGE, dtype=k.dtype)
    cache, bounds = append_quest(cache, init_quest(cache), keys, values, lengths)
    return from_rows(quest(queries, cache, bounds, budget=budget), q)


def count(length, budget):
    inside = (length - 1) % PAGE + 1
    return min(length, budget - PAGE + inside)


RECORDS = [
    Mechanism(
        "quest",
        partial(_run, budget=12),
        partial(_mask, budget=12),
        dense=partial(_run, budget=400),
        lengths=(1, 4, 5, 37),
        trainable=False,
        packed=False,
        continues=False,
        count=partial(count, budget=12),
        slow=True,
    )
]
