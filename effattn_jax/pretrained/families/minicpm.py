"""MiniCPM (arXiv:2404.06395) with its scaled embeddings, branches and logits; MiniCPM3 has latent attention, MiniCPM-4
LongRoPE and, where the config has a `sparse_config`, InfLLM-v2 (arXiv:2506.07900)."""

import math
from collections.abc import Sequence
from typing import Any

from effattn_jax import checks
from effattn_jax.pretrained.entry import Entry, norm
from effattn_jax.pretrained.families import llama
from effattn_jax.pretrained.families.kimi_linear import mla
from effattn_jax.pretrained.family import Config, Family
from effattn_jax.pretrained.rope import rope_options

TIED = {"tie_word_embeddings": True}  # where the config does not say
SELECTION = {
    "kernel_size": "kernel_size",
    "kernel_stride": "kernel_stride",
    "block_size": "block_size",
    "init_blocks": "init_blocks",
    "topk": "topk",
    "window": "window_size",
    "dense_len": "dense_len",
}
"""Options of `effattn_jax.layers.InfLLM2` and how `sparse_config` spells them."""


def blocks(config: Config) -> Sequence[str]:
    if is_latent(config):
        return ("mla",) * config["num_hidden_layers"]
    return ("infllm2" if config.get("sparse_config") else "attention",) * config["num_hidden_layers"]


def is_latent(config: Config) -> bool:
    return config["model_type"] == "minicpm3"


def attention_options(config: Config) -> dict[str, Any]:
    heads, bias = config["num_attention_heads"], config.get("attention_bias", False)
    sparse = config.get("sparse_config") or {}
    if sparse.get("use_nope"):
        checks.fail("sparse_config.use_nope", True, "false: blocks are chosen by rotated keys")
    return {
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads", heads),
        "head_dim": config["hidden_size"] // heads,
        "bias": bias,
        "out_bias": bias,
        **rope_options(config),
        **{ours: sparse[theirs] for ours, theirs in SELECTION.items() if theirs in sparse},
    }


def latent_options(config: Config) -> dict[str, Any]:
    if config.get("attention_bias"):
        checks.fail("attention_bias", True, "false")
    rotation = rope_options(config)
    return {
        "heads": config["num_attention_heads"],
        "latent_dim": config["kv_lora_rank"],
        "query_rank": config["q_lora_rank"],
        "key_dim": config["qk_nope_head_dim"],
        "rope_dim": config["qk_rope_head_dim"],
        "value_dim": config["v_head_dim"],
        "rope_theta": rotation["rope_theta"],
        "rope_scaling": rotation["rope_scaling"],
        "norm_eps": 1e-6,  # of the latents, whatever the config says of the others
    }


def options(config: Config) -> dict[str, Any]:
    dim = config["hidden_size"]
    mixer = latent_options(config) if is_latent(config) else attention_options(config)
    branch = {"branch": config.get("scale_depth", 1.0) / math.sqrt(config["num_hidden_layers"])}
    return {
        "vocab_size": config["vocab_size"],
        "dim": dim,
        "mlp_dim": config["intermediate_size"],
        "mixers": {blocks(config)[0]: mixer},
        "residual": branch,
        "mlp_residual": branch,
        "embedding_scale": config.get("scale_emb", 1.0),
        "logits_scale": config.get("dim_model_base", dim) / dim,
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": (TIED | dict(config))["tie_word_embeddings"],
    }


def outside(config: Config) -> Sequence[Entry]:
    return llama.outside(TIED | dict(config))


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer, bias = f"model.layers.{block}", config.get("attention_bias", False)
    mixer = f"{layer}.self_attn"
    return [
        *norm(f"{layer}.input_layernorm", "norm"),
        *(mla(mixer, config) if is_latent(config) else llama.attention(mixer, bias=bias, out_bias=bias)),
        *norm(f"{layer}.post_attention_layernorm", "mlp_norm"),
        *llama.gated_mlp(f"{layer}.mlp"),
    ]


FAMILY = Family(("minicpm", "minicpm3"), blocks, options, outside, inside)
