"""Mixture of block attention, MoBA (Lu et al. 2025, arXiv:2502.13189)."""

from typing import Any

from flax import nnx

from effattn_jax.layers.routed import Arrays, RoutedAttention
from effattn_jax.sparse.moba import moba
from effattn_jax.sparse.moba_cache import MoBACache, append_moba, cached_moba, init_moba_cache
from effattn_jax.typing import Array


class MoBA(RoutedAttention):
    """Each query head reads the block of its token and the topk - 1 blocks before whose mean key is nearest to q.

    No parameters beside those of attention, so that a layer can change between this and `Attention`.

    Args:
      dim: D.
      heads, kv_heads, head_dim, qk_norm, rope_theta: as of `Attention`.
      block_size: tokens of a block.
      topk: blocks of a query, its own counted.
    """

    def __init__(self, dim: int, *, block_size: int = 512, topk: int = 3, rngs: nnx.Rngs, **attention: Any):
        super().__init__(dim, rngs=rngs, **attention)
        self.block_size, self.topk = block_size, topk

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections, on average over a causal row."""
        means = (length / self.block_size) / 2
        keys = min((length + 1) / 2, self.topk * self.block_size)
        return self.heads * self.head_dim * (2 * means + 4 * keys)

    def read(self, asked: Arrays, remembered: Arrays, segment_ids: Array | None, cache: Any = None) -> Array:
        return moba(
            *asked,
            *remembered,
            block_size=self.block_size,
            topk=self.topk,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def init_cache(self, batch_size: int, capacity: int) -> MoBACache:
        sizes = batch_size, capacity, self.kv_heads, self.head_dim
        return init_moba_cache(*sizes, block_size=self.block_size, dtype=self.dtype)

    def append(self, remembered: Arrays, cache: MoBACache, new: Array | None) -> MoBACache:
        k, v = remembered
        return append_moba(cache, k, v, block_size=self.block_size, new=new)

    def step(self, asked: Arrays, remembered: Arrays, cache: MoBACache, new: Array | None) -> tuple[Array, MoBACache]:
        (q,), (k, v) = asked, remembered
        return cached_moba(
            q,
            k,
            v,
            cache,
            block_size=self.block_size,
            topk=self.topk,
            new=new,
            implementation=self.implementation,
        )
