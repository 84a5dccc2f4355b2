"""DeepSeek sparse attention, DSA (DeepSeek-AI 2025, arXiv:2512.02556)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers.layer_norm import LayerNorm
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rope import rope
from effattn_jax.layers.routed import Arrays, RoutedAttention
from effattn_jax.sparse.dsa import dsa
from effattn_jax.sparse.dsa_cache import DSACache, append_dsa, cached_dsa, init_dsa_cache
from effattn_jax.sparse.indexer_loss import indexer_loss
from effattn_jax.typing import Array, Float, Hidden, Positions, SegmentIds


class DSA(RoutedAttention):
    """All heads read the topk tokens with the highest sum_j w_j ReLU(q^I_j . k^I): the score of a light indexer.

    q^I = rope(W_q x) in J heads of I channels, k^I = rope(LayerNorm(W_k x)) of one, w = W_w x / sqrt(J I). The first
    half of the indexer's channels is rotated, split-half. The indexer reads x without gradient: it learns by
    `indexer_loss` alone, the rest by the model's loss alone.

    Args:
      dim: D.
      heads, kv_heads, head_dim, qk_norm, rope_theta: as of `Attention`.
      index_heads, index_dim: of the indexer.
      topk: tokens of a query.
    """

    def __init__(
        self,
        dim: int,
        *,
        index_heads: int = 64,
        index_dim: int = 128,
        topk: int = 2048,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        super().__init__(dim, rngs=rngs, **attention)
        if index_heads < 1:
            checks.fail("index_heads", index_heads, "at least 1")
        if index_dim < 1 or index_dim % 4:
            checks.fail("index_dim", index_dim, "a multiple of 4: half of the channels is rotated in pairs")
        self.index_heads, self.index_dim, self.topk = index_heads, index_dim, topk
        options: dict[str, Any] = {"dtype": self.dtype, "rngs": rngs}
        self.index_q_proj = Projection(dim, index_heads * index_dim, ("embed", "heads"), **options)
        self.index_k_proj = Projection(dim, index_dim, ("embed", "state"), **options)
        self.index_weight_proj = Projection(dim, index_heads, ("embed", "heads"), **options)
        self.index_norm = LayerNorm(index_dim, axis="state", dtype=self.dtype)

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections, on average over a causal row."""
        mean = (length + 1) / 2
        return 2 * self.index_heads * self.index_dim * mean + 4 * self.heads * self.head_dim * min(mean, self.topk)

    def remember(self, x: Hidden, positions: Positions) -> tuple[Array, ...]:
        index_k = self.index_norm(self.index_k_proj(jax.lax.stop_gradient(x)))
        return *super().remember(x, positions), self._turned(index_k[:, :, None], positions)[:, :, 0]

    def ask(self, x: Hidden, positions: Positions) -> tuple[Array, ...]:
        x_only = jax.lax.stop_gradient(x)
        index_q = self.index_q_proj(x_only).reshape(*x.shape[:2], self.index_heads, self.index_dim)
        scale = (self.index_heads * self.index_dim) ** -0.5
        weights = scale * self.index_weight_proj(x_only).astype(jnp.float32)
        return *super().ask(x, positions), self._turned(index_q, positions), weights

    def _turned(self, x: Float[Array, "B T J I"], positions: Positions) -> Float[Array, "B T J I"]:
        return x if self.rope_theta is None else rope(x, positions, theta=self.rope_theta, fraction=0.5)

    def read(self, asked: Arrays, remembered: Arrays, segment_ids: Array | None, cache: Any = None) -> Array:
        q, index_q, weights = asked
        k, v, index_k = remembered
        return dsa(
            q,
            k,
            v,
            index_q,
            index_k,
            weights,
            topk=self.topk,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def init_cache(self, batch_size: int, capacity: int) -> DSACache:
        sizes = batch_size, capacity, self.kv_heads, self.head_dim
        return init_dsa_cache(*sizes, index_dim=self.index_dim, dtype=self.dtype)

    def append(self, remembered: Arrays, cache: DSACache, new: Array | None) -> DSACache:
        return append_dsa(cache, *remembered, new=new)

    def step(self, asked: Arrays, remembered: Arrays, cache: DSACache, new: Array | None) -> tuple[Array, DSACache]:
        (q, index_q, weights), (k, v, index_k) = asked, remembered
        return cached_dsa(
            q, k, v, index_q, index_k, weights, cache, topk=self.topk, new=new, implementation=self.implementation
        )

    def indexer_loss(
        self,
        x: Hidden,
        *,
        warm_up: bool,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Float[Array, ""]:
        """Mean over the tokens of KL(attention of all heads || softmax of the indexer), a loss for the indexer alone.

        warm_up: over all tokens of the past, while the model reads them all; else over the topk that are read.
        """
        if positions is None:
            positions = jnp.arange(x.shape[1])[None]
        (q, index_q, weights), (k, _, index_k) = self.ask(x, positions), self.remember(x, positions)
        of_tokens = indexer_loss(
            q, k, index_q, index_k, weights, topk=None if warm_up else self.topk, segment_ids=segment_ids
        )
        if segment_ids is None:
            return jnp.mean(of_tokens)
        return jnp.sum(of_tokens) / jnp.maximum(jnp.sum(jnp.asarray(segment_ids) >= 0), 1)
