"""Longformer with two global tokens, the first of a row and its sixth."""

import numpy as np

from effattn_jax.sparse.longformer import longformer_attention
from tests.sparse.mechanism import Mechanism

WINDOW, GLOBAL = 3, (0, 5)


def _run(q, k, v):
    return longformer_attention(q, k, v, np.broadcast_to(np.array(GLOBAL), (q.shape[0], 2)), window=WINDOW)


def _mask(q, k):
    (batch, length, heads, _), keys = q.shape, k.shape[1]
    mask = np.zeros((batch, heads, length, keys), bool)
    for t, j in np.ndindex(length, keys):
        p = keys - length + t
        mask[:, :, t, j] = abs(p - j) <= WINDOW or j in GLOBAL or p in GLOBAL
    return mask


# packed rows: their own test gives global positions of every document
RECORDS = [Mechanism("longformer", _run, _mask, lengths=(9, 37), causal=False, packed=False)]
