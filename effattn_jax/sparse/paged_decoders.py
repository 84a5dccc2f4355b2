"""Decoders over all tokens, in pages."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from effattn_jax.sparse.decoder import Decoder, Out
from effattn_jax.sparse.double_sparsity import (
    append_labels,
    calibrate,
    double_sparsity,
    init_calibration,
    init_labels,
    label_channels,
)
from effattn_jax.sparse.paged_cache import PagedCache, init_paged_cache
from effattn_jax.sparse.quest import PageBounds, append_quest, init_quest, quest
from effattn_jax.typing import Array, Int


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


def _pages(k: Array, v: Array, max_length: int, page_size: int) -> PagedCache:
    batch, row_pages = k.shape[0], -(-max_length // page_size)
    sizes = (batch, batch * row_pages, row_pages, *k.shape[2:], v.shape[3])
    return init_paged_cache(*sizes, page_size=page_size, dtype=k.dtype)


def _by_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of rows one by one, as batches of 1; what comes after q, k and v is one for each row already."""
    return jax.vmap(lambda q, k, v, *rest: function(q[None], k[None], v[None], *rest))
