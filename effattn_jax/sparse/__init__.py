"""Softmax attention that reads a selection of the keys, as pure functions."""

from effattn_jax.sparse.attention import attention
from effattn_jax.sparse.cache import KVCache, cached_attention, init_cache

__all__ = ["KVCache", "attention", "cached_attention", "init_cache"]
