"""DeepSeek sparse attention with an indexer that reads some channels of the queries and keys."""

from functools import partial

import numpy as np

from effattn_jax.sparse.dsa import dsa
from effattn_jax.sparse.dsa_cache import cached_dsa, init_dsa_cache
from tests.sparse.mechanism import Mechanism
from tests.sparse.token_by_token import token_by_token


def indexer(q, k):
    return q[:, :, :3, :5], k[:, :, 0, :5], q[:, :, 1:, 6]


def tokens(index_q, index_k, weights, topk):
    """The lists of [B, T], the highest score first."""
    (batch, length, heads, _), keys = index_q.shape, index_k.shape[1]
    lists = {}
    for b, t in np.ndindex(batch, length):
        past = range(keys - length + t + 1)
        score = [sum(weights[b, t, j] * max(index_q[b, t, j] @ index_k[b, s], 0) for j in range(heads)) for s in past]
        lists[b, t] = sorted(past, key=lambda s: (-score[s], s))[:topk]
    return lists


def _mask(q, k, topk):
    mask = np.zeros((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), bool)
    for (b, t), chosen in tokens(*indexer(q, k), topk).items():
        mask[b, :, t, chosen] = True
    return mask


def _run(q, k, v, segment_ids=None, topk=None):
    return dsa(q, k, v, *indexer(q, k), topk=topk, segment_ids=segment_ids)


def _decode(q, k, v, topk):
    cache = init_dsa_cache(*k.shape, v.shape[3], index_dim=5, dtype=k.dtype)

    def step(q, k, v, cache):
        index_q, index_k, weights = indexer(q, k)
        return cached_dsa(q, k, v, index_q, index_k, weights, cache, topk=topk)

    return token_by_token(step, cache, q, k, v)


RECORDS = [
    Mechanism(
        "dsa",
        partial(_run, topk=7),
        partial(_mask, topk=7),
        decode=partial(_decode, topk=7),
        dense=partial(_run, topk=1000),
        lengths=(1, 7, 8, 37),
        count=lambda length: min(length, 7),
    )
]
