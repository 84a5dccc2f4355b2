"""Routing Transformer with the centroids of two heads, and with one centroid that takes every token."""

from functools import partial

import numpy as np

from effattn_jax.sparse.routing import routing_attention
from tests.sparse.inputs import randn
from tests.sparse.mechanism import Mechanism

CENTROIDS, ONE = randn(5, (2, 4, 8), (2, 1, 8))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def expected(q, k, v, centroids, window, causal=True, memory=None):
    q, k, v, centroids = (np.asarray(x).astype(np.float64) for x in (q, k, v, centroids))
    out = np.zeros(v.shape)
    batch, length, heads, key_dim = q.shape
    for b, h in np.ndindex(batch, heads):
        total, times = np.zeros((length, v.shape[-1])), np.zeros(length)
        for mu in centroids[h]:
            taken = [np.argsort(-unit(x[b, :, h]) @ unit(mu), kind="stable")[:window] for x in (q, k)]
            for i in taken[0]:
                read = [j for j in taken[1] if not causal or j <= i]
                keys, values = k[b, read, h], v[b, read, h]
                if memory is not None:
                    keys, values = (np.concatenate([m[h], x]) for m, x in zip(memory, (keys, values), strict=True))
                times[i] += 1
                if len(keys):
                    p = np.exp(keys @ q[b, i, h] / np.sqrt(key_dim))
                    total[i] += p / p.sum() @ values
        out[b, :, h] = total / np.maximum(times, 1)[:, None]
    return out


def _run(q, k, v, centroids=CENTROIDS, window=9):
    return routing_attention(q, k, v, centroids, window=window)


RECORDS = [
    Mechanism(
        "routing",
        _run,
        oracle=partial(expected, centroids=CENTROIDS, window=9),
        dense=partial(_run, centroids=ONE, window=99),
        lengths=(1, 9, 37),
        heads=2,
        causal=False,  # a centroid takes the nearest tokens of the whole row
        packed=False,  # of all documents together
        continues=False,
        shared=False,
        slow=True,
    )
]
