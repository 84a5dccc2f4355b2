"""StreamingLLM in one call."""

from functools import partial

from effattn_jax.sparse.streaming import cached_streaming_attention, init_streaming_cache, streaming_attention
from tests.sparse.mechanism import Mechanism
from tests.sparse.rotary import rotary
from tests.sparse.streaming_oracle import streaming
from tests.sparse.token_by_token import token_by_token

SIZES = {"start": 3, "recent": 6}


def _oracle(q, k, v):
    return streaming(q, k, v, **SIZES)[0]


def _decode(q, k, v):
    cache = init_streaming_cache(k.shape[0], *k.shape[2:], v.shape[3], dtype=k.dtype, **SIZES)
    return token_by_token(partial(cached_streaming_attention, rotate=rotary), cache, q, k, v)


RECORDS = [
    Mechanism(
        "streaming",
        partial(streaming_attention, rotate=rotary, **SIZES),
        oracle=_oracle,
        decode=_decode,
        lengths=(1, 9, 37),
        packed=False,
        count=lambda length: min(length, 9),
    )
]
