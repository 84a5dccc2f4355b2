"""Native sparse attention with one set of keys and values (Yuan et al. 2025, arXiv:2502.11089), as
flash-linear-attention has it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.routed import Arrays, RoutedAttention
from effattn_jax.precision import accumulation_dtype
from effattn_jax.sparse.nsa import KV, nsa
from effattn_jax.sparse.nsa_cache import NSACache, append_nsa, cached_nsa, init_nsa_cache
from effattn_jax.sparse.sorting_network import kept_by_network
from effattn_jax.typing import Array, Hidden, Positions

FORCED = 3  # the first block, the query's own and the one before it


class SharedNSA(RoutedAttention):
    """The three branches of `NSA` over the same keys and values, weighed by g = sigmoid(W_g x), three numbers per head:

    whole blocks, of which keys, rotated, and values are averaged; topk blocks, the first, the last two and those of the
    highest weights in the first branch; the last `window` tokens.

    Args:
      dim: D.
      heads, kv_heads, head_dim, qk_norm, rope_theta, bias: as of `Attention`.
      block_size: tokens of a block, which are compressed to one.
      topk, window: as of `effattn_jax.sparse.nsa`. With topk below 3 nothing is chosen: `kept_by_network` says which of
        the three forced blocks are read; block_size must be a power of two.
    """

    def __init__(
        self,
        dim: int,
        *,
        block_size: int = 64,
        topk: int = 16,
        window: int = 512,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        super().__init__(dim, rngs=rngs, **attention)
        if topk < FORCED and block_size & (block_size - 1):
            checks.fail("block_size", block_size, f"a power of two where topk is below {FORCED}")
        self.block_size, self.topk, self.window = block_size, topk, window
        self.gate_proj = Projection(dim, 3 * self.heads, ("embed", "heads"), dtype=self.dtype, rngs=rngs)

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections, on average over a causal row."""
        mean = (length + 1) / 2
        keys = mean / self.block_size + min(mean, self.topk * self.block_size) + min(mean, self.window)
        return 4 * self.heads * self.head_dim * keys

    def ask(self, x: Hidden, positions: Positions) -> tuple[Array, ...]:
        gates = jax.nn.sigmoid(self.gate_proj(x).astype(jnp.float32))
        return *super().ask(x, positions), gates.reshape(*x.shape[:2], self.heads, 3)

    def read(self, asked: Arrays, remembered: Arrays, segment_ids: Array | None, cache: Any = None) -> Array:
        (q, gates), kv = asked, KV(*remembered)
        return nsa(q, kv, kv, kv, gates, segment_ids=segment_ids, **self._options(kv.k.shape[1]))

    def _options(self, tokens: int) -> dict[str, Any]:
        """For rows of so many tokens."""
        lists = None
        if self.topk < FORCED:
            lists = kept_by_network(-(-tokens // self.block_size), self.block_size, self.topk)
        return {
            "kernel_size": self.block_size,
            "kernel_stride": self.block_size,
            "block_size": self.block_size,
            "topk": self.topk,
            "init_blocks": 1,
            "local_blocks": 2,
            "window": self.window,
            "lists": lists,
            "implementation": self.implementation,
        }

    def init_cache(self, batch_size: int, capacity: int) -> NSACache:
        return init_nsa_cache(
            batch_size,
            capacity,
            self.kv_heads,
            self.head_dim,
            kernel_size=self.block_size,
            kernel_stride=self.block_size,
            window=self.window,
            dtype=self.dtype,
            compressed_dtype=accumulation_dtype(self.dtype),
        )

    def append(self, remembered: Arrays, cache: NSACache, new: Array | None) -> NSACache:
        kv = KV(*remembered)
        return append_nsa(kv, kv, kv, cache, kernel_size=self.block_size, kernel_stride=self.block_size, new=new)

    def step(self, asked: Arrays, remembered: Arrays, cache: NSACache, new: Array | None) -> tuple[Array, NSACache]:
        (q, gates), kv = asked, KV(*remembered)
        return cached_nsa(q, kv, kv, kv, gates, cache, new=new, **self._options(cache.selected.k.shape[1]))
