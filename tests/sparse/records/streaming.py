"""StreamingLLM in one call."""

from functools import partial

from effattn_jax.sparse.streaming import streaming_attention
from tests.sparse.mechanism import Mechanism
from tests.sparse.rotary import rotary
from tests.sparse.streaming_oracle import streaming

SIZES = {"start": 3, "recent": 6}


def _oracle(q, k, v):
    return streaming(q, k, v, **SIZES)[0]


RECORDS = [
    Mechanism(
        "streaming",
        partial(streaming_attention, rotate=rotary, **SIZES),
        oracle=_oracle,
        lengths=(1, 9, 37),
        packed=False,
        count=lambda length: min(length, 9),
    )
]
