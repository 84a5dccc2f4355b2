"""The sliding window: the smallest example of a record."""

from functools import partial

import numpy as np

from effattn_jax.sparse import attention, cached_attention, init_cache
from tests.sparse.mechanism import Mechanism
from tests.sparse.token_by_token import token_by_token


def _mask(q, k, window):
    batch, length, heads, _ = q.shape
    keys = k.shape[1]
    mask = np.zeros((batch, heads, length, keys), bool)
    for t in range(length):
        position = keys - length + t
        mask[:, :, t, max(0, position - window + 1) : position + 1] = True
    return mask


def _run(q, k, v, segment_ids=None, window=None):
    return attention(q, k, v, window=window, segment_ids=segment_ids)


def _decode(q, k, v, window):
    cache = init_cache(k.shape[0], window, *k.shape[2:], v.shape[3], dtype=k.dtype)
    return token_by_token(partial(cached_attention, window=window), cache, q, k, v)


RECORDS = [
    Mechanism(
        "window",
        partial(_run, window=5),
        partial(_mask, window=5),
        decode=partial(_decode, window=5),
        dense=partial(_run, window=10_000),
        count=lambda length: min(length, 5),
    )
]
