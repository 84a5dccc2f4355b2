"""Mistral 7B: grouped-query attention over a window (Jiang et al. 2023, arXiv:2310.06825)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, norm
from effattn_jax.pretrained.families import llama
from effattn_jax.pretrained.family import Config, Family
from effattn_jax.pretrained.rope import rope_options


def blocks(config: Config) -> Sequence[str]:
    return ("attention",) * config["num_hidden_layers"]


def options(config: Config) -> dict[str, Any]:
    attention = {
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "window": config.get("sliding_window"),
        **rope_options(config),
    }
    return {
        "vocab_size": config["vocab_size"],
        "dim": config["hidden_size"],
        "mlp_dim": config["intermediate_size"],
        "mixers": {"attention": attention},
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer = f"model.layers.{block}"
    return [
        *norm(f"{layer}.input_layernorm", "norm"),
        *llama.attention(f"{layer}.self_attn"),
        *norm(f"{layer}.post_attention_layernorm", "mlp_norm"),
        *llama.gated_mlp(f"{layer}.mlp"),
    ]


FAMILY = Family(("mistral",), blocks, options, llama.outside, inside)
