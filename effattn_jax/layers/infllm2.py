"""InfLLM-v2, the attention of MiniCPM-4 (Zhao et al. 2025, arXiv:2509.24663)."""

import sys
from typing import Any

from flax import nnx

from effattn_jax.layers.routed import Arrays, RoutedAttention
from effattn_jax.sparse.infllm2 import infllm2
from effattn_jax.sparse.infllm2_cache import InfLLM2Cache, append_infllm2, cached_infllm2, init_infllm2_cache
from effattn_jax.typing import Array


class InfLLM2(RoutedAttention):
    """The heads of a group read the first blocks, a window, and the topk blocks that mean keys of short windows choose.

    No parameters beside those of attention: short rows (below `dense_len`) are read whole, with the same weights.

    Args:
      dim: D.
      heads, kv_heads, head_dim, qk_norm, rope_theta: as of `Attention`.
      kernel_size, kernel_stride, block_size, init_blocks, topk, window, dense_len: as of `effattn_jax.sparse.infllm2`.
        With a state its capacity counts as the row's length.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int = 32,
        kernel_stride: int = 16,
        block_size: int = 64,
        init_blocks: int = 1,
        topk: int = 64,
        window: int = 2048,
        dense_len: int = 8192,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        super().__init__(dim, rngs=rngs, **attention)
        self.options: dict[str, Any] = {
            "kernel_size": kernel_size,
            "kernel_stride": kernel_stride,
            "block_size": block_size,
            "init_blocks": init_blocks,
            "topk": topk,
            "window": window,
            "dense_len": dense_len,
        }

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections, on average over a causal row."""
        mean = (length + 1) / 2
        if length < self.options["dense_len"]:
            return 4 * self.heads * self.head_dim * mean
        keys = min(mean, self.options["topk"] * self.options["block_size"] + self.options["window"])
        return self.heads * self.head_dim * (2 * mean / self.options["kernel_stride"] + 4 * keys)

    def read(self, asked: Arrays, remembered: Arrays, segment_ids: Array | None, cache: Any = None) -> Array:
        options = self._options(remembered[0].shape[1] if cache is None else cache.k.shape[1])
        return infllm2(*asked, *remembered, segment_ids=segment_ids, implementation=self.implementation, **options)

    def _options(self, length: int) -> dict[str, Any]:
        """Of a row that counts as so long."""
        return self.options | {"dense_len": sys.maxsize if length < self.options["dense_len"] else -1}

    def _windows(self) -> dict[str, Any]:
        return {name: self.options[name] for name in ("kernel_size", "kernel_stride")}

    def init_cache(self, batch_size: int, capacity: int) -> InfLLM2Cache:
        sizes = batch_size, capacity, self.kv_heads, self.head_dim
        return init_infllm2_cache(*sizes, **self._windows(), dtype=self.dtype)

    def append(self, remembered: Arrays, cache: InfLLM2Cache, new: Array | None) -> InfLLM2Cache:
        k, v = remembered
        return append_infllm2(cache, k, v, **self._windows(), new=new)

    def step(
        self, asked: Arrays, remembered: Arrays, cache: InfLLM2Cache, new: Array | None
    ) -> tuple[Array, InfLLM2Cache]:
        (q,), (k, v) = asked, remembered
        options = self._options(cache.k.shape[1])
        return cached_infllm2(q, k, v, cache, new=new, implementation=self.implementation, **options)
