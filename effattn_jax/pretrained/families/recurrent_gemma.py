"""RecurrentGemma: two blocks of RG-LRU to one of attention over a window (Botev et al. 2024, arXiv:2404.07839)."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes

from effattn_jax.pretrained.entry import Entry, convolution, linear, norm, same
from effattn_jax.pretrained.families import llama
from effattn_jax.pretrained.family import Config, Family
from effattn_jax.pretrained.rope import rope_options

ROTATED = 0.5  # where the config does not say


def blocks(config: Config) -> Sequence[str]:
    kinds = config["block_types"]
    return [kinds[i % len(kinds)] for i in range(config["num_hidden_layers"])]


def options(config: Config) -> dict[str, Any]:
    rotation = rope_options({"partial_rotary_factor": ROTATED} | dict(config))
    return {
        "vocab_size": config["vocab_size"],
        "dim": config["hidden_size"],
        "mlp_dim": config["intermediate_size"] // 2,
        "mlp_options": {"activation": "gelu_tanh", "bias": True},
        "norm": "rms_about_one",
        "mixers": {
            "recurrent": {
                "kind": "rg_lru",
                "width": config["lru_width"],
                "heads": config["num_attention_heads"],
                "conv_width": config["conv1d_width"],
            },
            "attention": {
                "heads": config["num_attention_heads"],
                "kv_heads": config.get("num_key_value_heads") or 1,
                "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
                "window": config["attention_window_size"],
                "bias": config.get("attention_bias", False),
                "out_bias": True,
                **rotation,
            },
        },
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "embedding_scale": float(ml_dtypes.bfloat16(config["hidden_size"] ** 0.5)),  # as the authors round it
        "logits_soft_cap": config["logits_soft_cap"],
    }


def outside(config: Config) -> Sequence[Entry]:
    tied = config.get("tie_word_embeddings", True)
    return [
        *same("model.embed_tokens.weight", "embedding"),
        *norm("model.final_norm", "final_norm"),
        *([] if tied else linear("lm_head", "head")),
    ]


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer = f"model.layers.{block}"
    mixer = f"{layer}.temporal_block"
    mixers = {
        "recurrent": recurrent(mixer),
        "attention": llama.attention(mixer, bias=config.get("attention_bias", False), out_bias=True),
    }
    return [
        *norm(f"{layer}.temporal_pre_norm", "norm"),
        *mixers[blocks(config)[block]],
        *norm(f"{layer}.channel_pre_norm", "mlp_norm"),
        *llama.gated_mlp(f"{layer}.mlp_block", bias=True),
    ]


def recurrent(below: str) -> list[Entry]:
    gates = {"input_gate": "input_gate", "recurrent_gate": "recurrence_gate"}
    return [
        *linear(f"{below}.linear_y", "mixer.y_proj", bias=True),
        *linear(f"{below}.linear_x", "mixer.x_proj", bias=True),
        *convolution(f"{below}.conv_1d", "mixer.conv", bias=True),
        *(entry for t, o in gates.items() for entry in same(f"{below}.rg_lru.{t}_weight", f"mixer.{o}.kernel")),
        *(entry for t, o in gates.items() for entry in same(f"{below}.rg_lru.{t}_bias", f"mixer.{o}.bias")),
        *same(f"{below}.rg_lru.recurrent_param", "mixer.rate"),
        *linear(f"{below}.linear_out", "mixer.out_proj", bias=True),
    ]


FAMILY = Family(("recurrent_gemma",), blocks, options, outside, inside)
