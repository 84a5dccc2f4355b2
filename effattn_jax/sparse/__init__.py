"""Softmax attention that reads a selection of the keys, as pure functions.

A selector says which blocks or tokens each query may read, `block_attention` reads exactly those. Masks that are known
beforehand are objects (`masks`, `listed_masks`, `patterns`), which `masked_attention` reads tile by tile.
"""

from effattn_jax.sparse.attention import attention
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.cache import KVCache, cached_attention, init_cache
from effattn_jax.sparse.cluster_cache import Clustering, append_clusters, init_cluster_cache, prefill_clusters
from effattn_jax.sparse.cluster_kv import cached_cluster_kv
from effattn_jax.sparse.double_sparsity import double_sparsity
from effattn_jax.sparse.dsa import dsa
from effattn_jax.sparse.dsa_cache import cached_dsa, init_dsa_cache
from effattn_jax.sparse.flexprefill import flexprefill
from effattn_jax.sparse.forgetting import forgetting_attention
from effattn_jax.sparse.forgetting_cache import ForgettingCache, cached_forgetting_attention, init_forgetting_cache
from effattn_jax.sparse.h2o import h2o, h2o_prefill
from effattn_jax.sparse.indexer_loss import indexer_loss
from effattn_jax.sparse.infllm2 import infllm2
from effattn_jax.sparse.infllm2_cache import cached_infllm2, init_infllm2_cache
from effattn_jax.sparse.latent_cache import LatentCache, cached_latent_attention, init_latent_cache
from effattn_jax.sparse.longformer import longformer_attention
from effattn_jax.sparse.longnet import longnet_attention
from effattn_jax.sparse.masked_attention import masked_attention
from effattn_jax.sparse.merge import merge, with_sinks
from effattn_jax.sparse.minference import minference
from effattn_jax.sparse.moba import moba
from effattn_jax.sparse.moba_cache import cached_moba, init_moba_cache
from effattn_jax.sparse.nsa import nsa, nsa_compress
from effattn_jax.sparse.nsa_cache import cached_nsa, init_nsa_cache
from effattn_jax.sparse.paged_cache import PagedCache, init_paged_cache
from effattn_jax.sparse.path import path_attention
from effattn_jax.sparse.path_cache import PathCache, cached_path_attention, init_path_cache
from effattn_jax.sparse.quest import quest
from effattn_jax.sparse.reformer import reformer_attention
from effattn_jax.sparse.retrieval import KeyIndices, retrieval_attention
from effattn_jax.sparse.retro import cached_retro
from effattn_jax.sparse.routing import routing_attention
from effattn_jax.sparse.snapkv import snapkv, snapkv_prefill
from effattn_jax.sparse.spargeattn import spargeattn
from effattn_jax.sparse.streaming import cached_streaming_attention, init_streaming_cache, streaming_attention
from effattn_jax.sparse.xattention import xattention

__all__ = [
    "Clustering",
    "ForgettingCache",
    "KVCache",
    "KeyIndices",
    "LatentCache",
    "PagedCache",
    "PathCache",
    "append_clusters",
    "attention",
    "block_attention",
    "cached_attention",
    "cached_cluster_kv",
    "cached_dsa",
    "cached_forgetting_attention",
    "cached_infllm2",
    "cached_latent_attention",
    "cached_moba",
    "cached_nsa",
    "cached_path_attention",
    "cached_retro",
    "cached_streaming_attention",
    "double_sparsity",
    "dsa",
    "flexprefill",
    "forgetting_attention",
    "h2o",
    "h2o_prefill",
    "indexer_loss",
    "infllm2",
    "init_cache",
    "init_cluster_cache",
    "init_dsa_cache",
    "init_forgetting_cache",
    "init_infllm2_cache",
    "init_latent_cache",
    "init_moba_cache",
    "init_nsa_cache",
    "init_paged_cache",
    "init_path_cache",
    "init_streaming_cache",
    "longformer_attention",
    "longnet_attention",
    "masked_attention",
    "merge",
    "minference",
    "moba",
    "nsa",
    "nsa_compress",
    "path_attention",
    "prefill_clusters",
    "quest",
    "reformer_attention",
    "retrieval_attention",
    "routing_attention",
    "snapkv",
    "snapkv_prefill",
    "spargeattn",
    "streaming_attention",
    "with_sinks",
    "xattention",
]
