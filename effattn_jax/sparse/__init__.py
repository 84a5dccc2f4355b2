"""Softmax attention that reads a selection of the keys, as pure functions."""

from effattn_jax.sparse.attention import attention
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.cache import KVCache, cached_attention, init_cache
from effattn_jax.sparse.forgetting import forgetting_attention
from effattn_jax.sparse.forgetting_cache import ForgettingCache, cached_forgetting_attention, init_forgetting_cache
from effattn_jax.sparse.merge import merge, with_sinks
from effattn_jax.sparse.path import path_attention
from effattn_jax.sparse.path_cache import PathCache, cached_path_attention, init_path_cache

__all__ = [
    "ForgettingCache",
    "KVCache",
    "PathCache",
    "attention",
    "block_attention",
    "cached_attention",
    "cached_forgetting_attention",
    "cached_path_attention",
    "forgetting_attention",
    "init_cache",
    "init_forgetting_cache",
    "init_path_cache",
    "merge",
    "path_attention",
    "with_sinks",
]
