"""Reformer, whose keys are its queries: what the suite draws as keys is not read."""

from functools import partial

import numpy as np

from effattn_jax.sparse.reformer import reformer_attention
from tests.sparse.inputs import randn
from tests.sparse.mechanism import Mechanism

SIZE = 8
(ROTATIONS,) = randn(5, (3, 8, 3))


def meetings(x, rotations, size, same_bucket):
    """[T, T], in how many rounds token i meets token j; one head of one row, filled up with zeros."""
    length, total = len(x), -(-len(x) // size) * size
    x = np.concatenate([x, np.zeros((total - length, x.shape[1]))])
    count = np.zeros((length, length))
    for rotation in rotations:
        turned = x @ rotation
        bucket = np.argmax(np.concatenate([turned, -turned], -1), -1)
        place = np.empty(total, int)
        place[sorted(range(total), key=lambda i: (bucket[i], i))] = np.arange(total)
        for i, j in np.ndindex(length, length):
            met = place[i] // size - place[j] // size in (0, 1)
            count[i, j] += met and not (same_bucket and bucket[i] != bucket[j])
    return count


def expected(qk, v, rotations, bucket_size, causal=True, same_bucket=False, count_once=False):
    qk, v, rotations = (np.asarray(x).astype(np.float64) for x in (qk, v, rotations))
    out = np.zeros(v.shape)
    for b, h in np.ndindex(qk.shape[0], qk.shape[2]):
        x = qk[b, :, h]
        weight = meetings(x, rotations, bucket_size, same_bucket)
        weight = np.minimum(weight, 1) if count_once else weight
        weight *= ~np.eye(len(x), dtype=bool) * (np.tri(len(x)) if causal else 1)
        s = x @ (x / np.linalg.norm(x, axis=-1, keepdims=True)).T / np.sqrt(x.shape[1])
        p = weight * np.exp(s)
        alone = p.sum(-1) == 0
        p[alone, alone] = 1
        out[b, :, h] = p / p.sum(-1, keepdims=True) @ v[b, :, h]
    return out


def _run(q, k, v, **options):
    return reformer_attention(q, v, ROTATIONS, bucket_size=SIZE, **options)


def _oracle(q, k, v, **options):
    return expected(q, v, ROTATIONS, SIZE, **options)


RECORDS = [
    Mechanism(
        name,
        partial(_run, **options),
        oracle=partial(_oracle, **options),
        lengths=(1, 8, 9, 37),
        heads=2,
        causal=False,  # where a chunk ends depends on every token
        packed=False,  # and so on every document: they are kept apart, but do not read what they would alone
        continues=False,
        shared=False,
        slow=True,
    )
    for name, options in (("reformer", {}), ("reformer once", {"count_once": True, "same_bucket": True}))
]
