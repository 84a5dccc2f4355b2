"""Mixture of block attention."""

from functools import partial

import numpy as np

from effattn_jax.sparse.moba import moba
from effattn_jax.sparse.moba_cache import cached_moba, init_moba_cache
from tests.sparse.mechanism import Mechanism
from tests.sparse.token_by_token import token_by_token


def blocks(q, k, block_size, topk):
    """The lists of [B, H, T], the own block first, then by falling gate."""
    (batch, length, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    lists = {}
    for b, h, t in np.ndindex(batch, heads, length):
        position = keys - length + t
        own = position // block_size
        of_head = k[b, :, h * groups // heads]
        gates = [q[b, t, h] @ of_head[n * block_size : (n + 1) * block_size].mean(0) for n in range(own)]
        lists[b, h, t] = [own, *sorted(range(own), key=lambda n: (-gates[n], n))[: topk - 1]]
    return lists


def mask_of(lists, q, k, block_size):
    (batch, length, heads, _), keys = q.shape, k.shape[1]
    mask = np.zeros((batch, heads, length, keys), bool)
    for (b, h, t), chosen in lists.items():
        position = keys - length + t
        for n in chosen:
            mask[b, h, t, n * block_size : min((n + 1) * block_size, position + 1)] = True
    return mask


def _mask(q, k, block_size, topk):
    return mask_of(blocks(q, k, block_size, topk), q, k, block_size)


def _run(q, k, v, segment_ids=None, **options):
    return moba(q, k, v, segment_ids=segment_ids, **options)


def _decode(q, k, v, block_size, topk):
    cache = init_moba_cache(*k.shape, v.shape[3], block_size=block_size, dtype=k.dtype)
    return token_by_token(partial(cached_moba, block_size=block_size, topk=topk), cache, q, k, v)


def count(length, block_size, topk):
    own, inside = divmod(length - 1, block_size)
    return inside + 1 + block_size * min(topk - 1, own)


RECORDS = [
    Mechanism(
        f"moba {topk}",
        partial(_run, block_size=8, topk=topk),
        partial(_mask, block_size=8, topk=topk),
        decode=partial(_decode, block_size=8, topk=topk),
        dense=partial(_run, block_size=8, topk=100),
        lengths=(1, 8, 9, 37),
        count=partial(count, block_size=8, topk=topk),
    )
    for topk in (1, 3)
]
