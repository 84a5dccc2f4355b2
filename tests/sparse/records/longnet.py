"""LongNet: two branches of which the second keeps every third token."""

from functools import partial

from effattn_jax.sparse.longnet import longnet_attention
from tests.sparse.longnet_oracle import longnet
from tests.sparse.mechanism import Mechanism

BRANCHES = {"segments": (5, 14), "ratios": (1, 3)}


def _run(q, k, v, segment_ids=None, **options):
    return longnet_attention(q, k, v, segment_ids=segment_ids, **BRANCHES | options)


RECORDS = [
    Mechanism(
        "longnet",
        _run,
        oracle=partial(longnet, **BRANCHES),
        dense=partial(_run, segments=(100,), ratios=(1,)),
        lengths=(1, 9, 37),
    ),
    Mechanism(
        "longnet both ways",
        partial(_run, causal=False, head_offset="modulo"),
        oracle=partial(longnet, **BRANCHES, causal=False, modulo=True),
        lengths=(9, 37),
        causal=False,
        packed=False,  # the record above is
    ),
]
