"""Decoding over what a prompt leaves behind, one interface for all caches. A decoder is its options.

`begin` makes the cache of a prompt, `step` reads with a new token what the cache has and takes it in.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.sparse.cache import KVCache, cached_attention, init_cache
from effattn_jax.sparse.cluster_cache import ClusterCache, Clustering, init_cluster_cache, prefill_clusters
from effattn_jax.sparse.cluster_kv import cached_cluster_kv
from effattn_jax.sparse.double_sparsity import (
    append_labels,
    calibrate,
    double_sparsity,
    init_calibration,
    init_labels,
    label_channels,
)
from effattn_jax.sparse.h2o import H2OCache, h2o, h2o_prefill
from effattn_jax.sparse.options import check_options
from effattn_jax.sparse.paged_cache import PagedCache, init_paged_cache
from effattn_jax.sparse.quest import PageBounds, append_quest, init_quest, quest
from effattn_jax.sparse.retro import CLUSTERING, cached_retro
from effattn_jax.sparse.snapkv import SnapKVCache, snapkv, snapkv_prefill
from effattn_jax.sparse.streaming import Rotate, StreamingCache, cached_streaming_attention, init_streaming_cache
from effattn_jax.typing import Array, Float, Int

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


@dataclass(frozen=True)
class Quest(Decoder):
    """`quest` over pages of `page_size` tokens."""

    budget: int
    page_size: int = 16
    force_last: bool = True

    def begin(
        self, q: Array, k: Array, v: Array, max_length: int, scale: float | None
    ) -> tuple[PagedCache, PageBounds]:
        cache = _pages(k, v, max_length, self.page_size)
        return append_quest(cache, init_quest(cache), k, v)

    def step(
        self, q: Array, k: Array, v: Array, cache: tuple[PagedCache, PageBounds], scale: float | None
    ) -> tuple[Out, tuple[PagedCache, PageBounds]]:
        cache = append_quest(*cache, k, v)
        return quest(q, *cache, budget=self.budget, force_last=self.force_last, scale=scale), cache


@dataclass(frozen=True)
class DoubleSparsity(Decoder):
    """`double_sparsity` by `channels` channels (None: K / 4), found on the prompt of each row, not offline."""

    heavy: int = 256
    channels: int | None = None
    page_size: int = 16

    def begin(self, q: Array, k: Array, v: Array, max_length: int, scale: float | None) -> Any:
        count = max(1, k.shape[3] // 4) if self.channels is None else self.channels

        def of_row(q: Array, k: Array, v: Array) -> tuple[PagedCache, Array, Int[Array, "G r"]]:
            channels = label_channels(calibrate(init_calibration(*k.shape[2:]), q, k), count)
            cache = _pages(k, v, max_length, self.page_size)
            return *append_labels(cache, init_labels(cache, channels), channels, k, v), channels

        return _by_row(of_row)(q, k, v)

    def step(self, q: Array, k: Array, v: Array, cache: Any, scale: float | None) -> tuple[Out, Any]:
        def of_row(q: Array, k: Array, v: Array, cache: Any) -> tuple[Out, Any]:
            pages, labels, channels = cache
            pages, labels = append_labels(pages, labels, channels, k, v)
            out = double_sparsity(q, pages, labels, channels, heavy=self.heavy, scale=scale)
            return out[0], (pages, labels, channels)

        return _by_row(of_row)(q, k, v, cache)


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
class ClusterKV(Decoder):
    """`cached_cluster_kv`."""

    budget: int = 1024
    clustering: Clustering = Clustering()  # noqa: RUF009

    def begin(self, q: Array, k: Array, v: Array, max_length: int, scale: float | None) -> ClusterCache:
        return _clusters(k, v, max_length, self.clustering)

    def step(self, q: Array, k: Array, v: Array, cache: ClusterCache, scale: float | None) -> tuple[Out, ClusterCache]:
        return cached_cluster_kv(q, k, v, cache, clustering=self.clustering, budget=self.budget, scale=scale)


@dataclass(frozen=True)
class Retro(Decoder):
    """`cached_retro`; shares are of the state's `max_length`."""

    retrieval: float = 0.018
    estimation: float = 0.232
    clustering: Clustering = CLUSTERING

    def begin(self, q: Array, k: Array, v: Array, max_length: int, scale: float | None) -> ClusterCache:
        return _clusters(k, v, max_length, self.clustering)

    def step(self, q: Array, k: Array, v: Array, cache: ClusterCache, scale: float | None) -> tuple[Out, ClusterCache]:
        shares: dict[str, Any] = {"retrieval": self.retrieval, "estimation": self.estimation}
        return cached_retro(q, k, v, cache, clustering=self.clustering, scale=scale, **shares)


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


DECODERS: dict[str, type[Decoder]] = {
    "quest": Quest,
    "double_sparsity": DoubleSparsity,
    "h2o": H2O,
    "snapkv": SnapKV,
    "cluster_kv": ClusterKV,
    "retro": Retro,
    "streaming": Streaming,
}


def decoder_of(decode: str | None, options: Mapping[str, Any]) -> Decoder:
    """Of a name; None reads everything.

    Raises:
      ValueError: a name or an option that does not exist, or an option that is missing.
    """
    if decode is None:
        if options:
            checks.fail("decode_options", sorted(options), "none without a mechanism")
        return Dense()
    if decode not in DECODERS:
        checks.fail("decode", repr(decode), f"None or one of {', '.join(DECODERS)}")
    check_options("decode_options", options, DECODERS[decode])
    return DECODERS[decode](**options)


def _pages(k: Array, v: Array, max_length: int, page_size: int) -> PagedCache:
    batch, row_pages = k.shape[0], -(-max_length // page_size)
    sizes = (batch, batch * row_pages, row_pages, *k.shape[2:], v.shape[3])
    return init_paged_cache(*sizes, page_size=page_size, dtype=k.dtype)


def _clusters(k: Array, v: Array, max_length: int, clustering: Clustering) -> ClusterCache:
    sizes = (k.shape[0], max_length, *k.shape[2:], v.shape[3])
    cache = init_cluster_cache(*sizes, clustering=clustering, dtype=k.dtype)
    return prefill_clusters(cache, k, v, clustering=clustering)


def _by_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of rows one by one, as batches of 1; what comes after q, k and v is one for each row already."""
    return jax.vmap(lambda q, k, v, *rest: function(q[None], k[None], v[None], *rest))
