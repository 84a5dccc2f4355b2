"""The fixed patterns as masks."""

from functools import partial

import numpy as np

from effattn_jax.sparse import patterns
from effattn_jax.sparse.masked_attention import masked_attention
from tests.sparse.mechanism import Mechanism

SIZES = {"query_block": 8, "block_size": 16}


def _mask(q, k, allowed):
    """`allowed(head, p, j)`, a pair at a time."""
    (batch, length, heads, _), keys = q.shape, k.shape[1]
    mask = [[[allowed(head, p, j) for j in range(keys)] for p in range(keys - length, keys)] for head in range(heads)]
    return np.broadcast_to(np.array(mask, bool), (batch, heads, length, keys))


def _run(q, k, v, segment_ids=None, make=None):
    return masked_attention(q, k, v, make(), segment_ids=segment_ids, **SIZES)[0]


def _pattern(name, make, allowed, **fields):
    return Mechanism(name, partial(_run, make=make), partial(_mask, allowed=allowed), **fields)


def _a_shape(h, p, j):
    return j <= p and (j < 3 or p - j < 6)


def _fixed(h, p, j):
    """Heads of other columns of the blocks of 6."""
    return j <= p and (p // 6 == j // 6 or j % 6 in ((4, 5), (2, 3))[h // 2])


def _longformer(h, p, j):
    return abs(p - j) <= 3 or j in (0, 9) or p in (0, 9)


# few, and packed rows once: `test_patterns` has more of both
LENGTHS = (9, 37)
RECORDS = [
    _pattern(
        "a shape",
        lambda: patterns.a_shape(3, 6),
        _a_shape,
        lengths=(1, *LENGTHS),
        dense=partial(_run, make=lambda: patterns.a_shape(3, 100)),
        count=lambda length: min(length, 9),
    ),
    _pattern(
        "dilated",
        lambda: patterns.dilated(4, 3),
        lambda h, p, j: p - j in (0, 3, 6, 9),
        lengths=LENGTHS,
        packed=False,
        count=lambda length: min(-(-length // 3), 4),
    ),
    _pattern(
        "fixed", lambda: [patterns.fixed(6, 2, head // 2) for head in range(4)], _fixed, lengths=LENGTHS, packed=False
    ),
    _pattern(
        "longformer mask",
        lambda: patterns.longformer(3, (0, 9)),
        _longformer,
        lengths=LENGTHS,
        causal=False,
        packed=False,
    ),
]
