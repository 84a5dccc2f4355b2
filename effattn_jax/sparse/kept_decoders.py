"""Decoders over some of the tokens: the others are gone."""

from dataclasses import dataclass
from typing import Any

from effattn_jax.sparse.decoder import Decoder, Out
from effattn_jax.sparse.h2o import H2OCache, h2o, h2o_prefill
from effattn_jax.sparse.snapkv import SnapKVCache, snapkv, snapkv_prefill
from effattn_jax.sparse.streaming import Rotate, StreamingCache, cached_streaming_attention, init_streaming_cache
from effattn_jax.typing import Array


@dataclass(frozen=True)
class H2O(Decoder):
    """`h2o`: heavy + recent tokens stay."""

    heavy: int
    recent: int

    def begin(self, q: Array, k: Array, v: Array, max_length: int, scale: float | None) -> H2OCache:
        return h2o_prefill(q, k, v, heavy=self.heavy, recent=self.recent, scale=scale)[1]

    def step(self, q: Array, k: Array, v: Array, cache: H2OCache, scale: float | None) -> tuple[Out, H2OCache]:
        return h2o(q, k, v, cache, recent=self.recent, scale=scale)


@dataclass(frozen=True)
class SnapKV(Decoder):
    """`snapkv`: of the prompt `capacity` tokens stay, and all that come after it."""

    window: int = 32
    capacity: int = 2048
    kernel: int = 5
    pool: str = "avg"

    def begin(self, q: Array, k: Array, v: Array, max_length: int, scale: float | None) -> SnapKVCache:
        sizes: dict[str, Any] = {"window": self.window, "capacity": self.capacity}
        room = max(1, max_length - q.shape[1])
        return snapkv_prefill(q, k, v, room=room, kernel=self.kernel, pool=self.pool, scale=scale, **sizes)[1]

    def step(self, q: Array, k: Array, v: Array, cache: SnapKVCache, scale: float | None) -> tuple[Out, SnapKVCache]:
        return snapkv(q, k, v, cache, scale=scale)


@dataclass(frozen=True)
class Streaming(Decoder):
    """`cached_streaming_attention`: the first `start` tokens and the last `recent`, at places in the cache."""

    start: int = 4
    recent: int = 512
    rotated = False
    many = True

    def begin(
        self, q: Array, k: Array, v: Array, max_length: int, scale: float | None, rotate: Rotate
    ) -> StreamingCache:
        sizes: dict[str, Any] = {"start": self.start, "recent": self.recent, "dtype": k.dtype}
        cache = init_streaming_cache(k.shape[0], k.shape[2], k.shape[3], v.shape[3], **sizes)
        return cached_streaming_attention(q, k, v, cache, rotate=rotate, scale=scale)[1]

    def step(
        self, q: Array, k: Array, v: Array, cache: StreamingCache, scale: float | None, rotate: Rotate
    ) -> tuple[Out, StreamingCache]:
        return cached_streaming_attention(q, k, v, cache, rotate=rotate, scale=scale)
