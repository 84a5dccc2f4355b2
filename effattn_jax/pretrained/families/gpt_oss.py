"""gpt-oss: learned sinks, every other block sees a window, YaRN, experts with biases (arXiv:2508.10925)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax import checks
from effattn_jax.layers.moe import ALPHA, LIMIT
from effattn_jax.pretrained.entry import Entry, norm, same
from effattn_jax.pretrained.families import llama
from effattn_jax.pretrained.family import Config, Family
from effattn_jax.pretrained.layout import INTERLEAVED
from effattn_jax.pretrained.rope import rope_options

LOCAL = "sliding_attention"


def blocks(config: Config) -> Sequence[str]:
    """From `layer_types`, else the first of two sees a window."""
    kinds = config.get("layer_types") or [
        "full_attention" if i % 2 else LOCAL for i in range(config["num_hidden_layers"])
    ]
    return ["local" if kind == LOCAL else "global" for kind in kinds]


def options(config: Config) -> dict[str, Any]:
    for key, value in (("swiglu_alpha", ALPHA), ("swiglu_limit", LIMIT)):
        if config.get(key, value) != value:
            checks.fail(key, config[key], str(value))
    bias = config.get("attention_bias", True)
    attention = {
        "kind": "attention",
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "bias": bias,
        "out_bias": bias,
        "sinks": True,
        **rope_options(config),
    }
    experts = {
        "experts": config["num_local_experts"],
        "top_k": config["num_experts_per_tok"],
        "renormalise": True,  # of a softmax over all: the softmax over those that are taken
        "bias": True,
        "activation": "clamped_swiglu",
    }
    return {
        "vocab_size": config["vocab_size"],
        "dim": config["hidden_size"],
        "mlp_dim": config["intermediate_size"],
        "mlp": "moe",
        "mlp_options": experts,
        "mixers": {"local": attention | {"window": config["sliding_window"]}, "global": attention},
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer, bias = f"model.layers.{block}", config.get("attention_bias", True)
    mixer, experts = f"{layer}.self_attn", f"{layer}.mlp.experts"
    return [
        *norm(f"{layer}.input_layernorm", "norm"),
        *llama.attention(mixer, bias=bias, out_bias=bias),
        *same(f"{mixer}.sinks", "mixer.sinks"),
        *norm(f"{layer}.post_attention_layernorm", "mlp_norm"),
        *llama.router(f"{layer}.mlp.router"),
        *same(f"{layer}.mlp.router.bias", "mlp.router.bias"),
        Entry(f"{experts}.gate_up_proj", ("mlp.gate.kernel", "mlp.up.kernel"), INTERLEAVED),
        Entry(f"{experts}.gate_up_proj_bias", ("mlp.gate.bias", "mlp.up.bias"), INTERLEAVED),
        *same(f"{experts}.down_proj", "mlp.down.kernel"),
        *same(f"{experts}.down_proj_bias", "mlp.down.bias"),
    ]


FAMILY = Family(("gpt_oss",), blocks, options, llama.outside, inside)
