"""InfLLM-v2, always sparse."""

from functools import partial

import numpy as np

from effattn_jax.sparse.infllm2 import infllm2
from effattn_jax.sparse.infllm2_cache import cached_infllm2, init_infllm2_cache
from tests.sparse.mechanism import Mechanism
from tests.sparse.records.moba import count, mask_of
from tests.sparse.token_by_token import token_by_token

SIZES = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8}


def scores(q, k, t, group, scale, kernel, stride, block_size, coarse=False):
    """Of one row q [T, H, K], k [M, G, K]: of each block the highest weight, summed over heads, of its windows."""
    (length, heads, _), (keys, groups) = q.shape[:3], k.shape[:2]
    position = keys - length + t

    def logits(head, times):
        starts = range(0, position + 2 - times * kernel, times * stride)
        return [scale * q[t, head] @ k[c : c + times * kernel, group].mean(0) for c in starts]

    total = 0
    for head in range(group * heads // groups, (group + 1) * heads // groups):
        s, normal = np.array(logits(head, 1)), logits(head, 4 if coarse else 1)
        if len(s):
            total += np.exp(s) / np.exp(normal or s).sum()
    result = []
    for j in range(-(-keys // block_size)):
        tokens = range(j * block_size, (j + 1) * block_size)
        met = [c for c in range(np.size(total)) if c * stride + kernel > tokens[0] and c * stride <= tokens[-1]]
        result.append(max((total[c] for c in met if np.ndim(total)), default=0.0))
    return np.array(result)


def blocks(q, k, topk, window, init_blocks=1, scale=None, coarse=False, kernel_size=4, kernel_stride=2, block_size=8):
    """The lists of [B, H, T]."""
    (batch, length, heads, key_dim), (keys, groups) = q.shape, k.shape[1:3]
    scale, local = key_dim**-0.5 if scale is None else scale, window // block_size
    lists = {}
    for b, g, t in np.ndindex(batch, groups, length):
        own = (keys - length + t) // block_size
        of = scores(q[b], k[b], t, g, scale, kernel_size, kernel_stride, block_size, coarse)
        forced = {j for j in range(own + 1) if j < init_blocks or own <= j + local}
        free = sorted(set(range(own + 1)) - forced, key=lambda j: (-of[j], j))
        chosen = [*forced, *free[: topk + local - len(forced)]]
        for head in range(g * heads // groups, (g + 1) * heads // groups):
            lists[b, head, t] = chosen
    return lists


def _mask(q, k, topk, window):
    return mask_of(blocks(q, k, topk, window), q, k, SIZES["block_size"])


def _run(q, k, v, segment_ids=None, **options):
    return infllm2(q, k, v, dense_len=-1, segment_ids=segment_ids, **SIZES, **options)


def _decode(q, k, v, **options):
    windows = {name: SIZES[name] for name in ("kernel_size", "kernel_stride")}
    cache = init_infllm2_cache(*k.shape, v.shape[3], dtype=k.dtype, **windows)
    return token_by_token(partial(cached_infllm2, dense_len=-1, **SIZES, **options), cache, q, k, v)


RECORDS = [
    Mechanism(
        "infllm2",
        partial(_run, topk=3, window=8),
        partial(_mask, topk=3, window=8),
        decode=partial(_decode, topk=3, window=8),
        dense=partial(_run, topk=100, window=8),
        lengths=(1, 4, 9, 47),
        count=partial(count, block_size=8, topk=4),
    )
]
