"""XAttention with a stride of half a block."""

from functools import partial

import numpy as np

from effattn_jax.sparse.xattention import xattention
from tests.sparse.mechanism import Mechanism
from tests.sparse.records.minference import SIZE, block_mask

STRIDE = 4


def antidiagonals(q, k, stride):
    """A of one head, an entry of a tile at a time."""
    result = np.zeros((-(-len(q) // stride), -(-len(k) // stride)))
    for i, j in np.ndindex(len(q), len(k)):
        if i % stride + j % stride == stride - 1:
            result[i // stride, j // stride] += q[i] @ k[j]
    return result


def values(q, k, stride=STRIDE, scale=None):
    """W of one head."""
    scale = q.shape[1] ** -0.5 if scale is None else scale
    before = (len(k) - len(q)) // stride
    result = np.zeros((-(-len(q) // SIZE), -(-len(k) // SIZE)))
    for i, row in enumerate(antidiagonals(q, k, stride)):
        s = scale / stride * row[: before + i + 1]
        p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
        for j, weight in enumerate(p):
            result[i * stride // SIZE, j * stride // SIZE] += weight
    return result


def blocks(q, k, tau, stride=STRIDE):
    before = (len(k) - len(q)) // SIZE
    for i, row in enumerate(values(q, k, stride)):
        own = before + i
        chosen = {0, own}
        for j in sorted(set(range(own)) - {0}, key=lambda j: (-row[j], j)):
            if sum(row[n] for n in chosen) < tau * row.sum():
                chosen.add(j)
        yield chosen


def _run(q, k, v, tau=0.6):
    return xattention(q, k, v, block_size=SIZE, stride=STRIDE, tau=tau)


RECORDS = [
    Mechanism(
        "xattention",
        _run,
        lambda q, k: block_mask(q, k, partial(blocks, tau=0.6)),
        dense=partial(_run, tau=1.1),
        lengths=(1, 8, 9, 37),
        causal=False,
        trainable=False,
        packed=False,
        continues=False,
        shared=False,
    )
]
