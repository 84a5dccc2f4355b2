"""What a prompt leaves behind, and how tokens after it are read: one interface for all caches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from effattn_jax.sparse.cache import KVCache, cached_attention, init_cache
from effattn_jax.typing import Array, Float

Out = Float[Array, "B T H V"]


class Decoder:
    """How tokens after a prompt are read.

    begin(q, k, v, max_length, scale) -> the cache of a prompt q: [B, T, H, K], k: [B, T, G, K], v: [B, T, G, V], with
    room up to `max_length` tokens. step(q, k, v, cache, scale) -> (out, cache), of one token, or of any number where
    `many`. Where not `rotated`, queries and keys come before their rotation, and `rotate` with them.
    """

    rotated: ClassVar[bool] = True
    many: ClassVar[bool] = False
    begin: Callable[..., Any]
    step: Callable[..., tuple[Out, Any]]

    def steps(self, q: Array, k: Array, v: Array, cache: Any, **how: Any) -> tuple[Out, Any]:
        """Of T new tokens, as if each had come alone."""
        if self.many or q.shape[1] == 1:
            return self.step(q, k, v, cache, **how)

        def one(cache: Any, token: tuple[Array, ...]) -> tuple[Any, Array]:
            out, cache = self.step(*(x[:, None] for x in token), cache, **how)
            return cache, out[:, 0]

        cache, out = jax.lax.scan(one, cache, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v)))
        return jnp.moveaxis(out, 0, 1), cache


@dataclass(frozen=True)
class Dense(Decoder):
    """Everything is read."""

    many = True

    def begin(self, q: Array, k: Array, v: Array, max_length: int, scale: float | None) -> KVCache:
        cache = init_cache(k.shape[0], max_length, k.shape[2], k.shape[3], v.shape[3], dtype=k.dtype)
        return cached_attention(q, k, v, cache, scale=scale)[1]

    def step(self, q: Array, k: Array, v: Array, cache: KVCache, scale: float | None) -> tuple[Out, KVCache]:
        return cached_attention(q, k, v, cache, scale=scale)
