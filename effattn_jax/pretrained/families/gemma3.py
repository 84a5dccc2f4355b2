"""Gemma 3: five blocks that see a window to one that sees all, query-key norms, two bases of rotary positions
(arXiv:2503.19786). Of a checkpoint with vision the language model alone."""

import math
from collections.abc import Sequence
from typing import Any

from effattn_jax import checks
from effattn_jax.pretrained.entry import Entry, norm
from effattn_jax.pretrained.families import llama
from effattn_jax.pretrained.family import Config, Family
from effattn_jax.pretrained.rope import rope_options

DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
"""What published configs leave out where it is so."""

LOCAL = "sliding_attention"
PERIOD, LOCAL_THETA, GLOBAL_THETA = 6, 10_000.0, 1_000_000.0


def complete(config: Config) -> dict[str, Any]:
    return DEFAULTS | dict(config)


def layer_types(config: Config) -> Sequence[str]:
    """`layer_types`, else every `sliding_window_pattern`-th sees all."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    period = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", PERIOD))
    count = complete(config)["num_hidden_layers"]
    return ["full_attention" if (i + 1) % period == 0 else LOCAL for i in range(count)]


def blocks(config: Config) -> Sequence[str]:
    return ["local" if kind == LOCAL else "global" for kind in layer_types(config)]


def rotation(config: Config, kind: str) -> dict[str, Any]:
    """The older spelling has a base of its own for windows, and `rope_scaling` for the rest."""
    if config.get("rope_parameters"):
        return rope_options(config, kind)
    if kind == LOCAL:
        return {"rope_theta": float(config.get("rope_local_base_freq", LOCAL_THETA))}
    return rope_options({"rope_theta": GLOBAL_THETA} | dict(config))


def options(config: Config) -> dict[str, Any]:
    of = complete(config)
    if of["hidden_activation"] != DEFAULTS["hidden_activation"]:
        checks.fail("hidden_activation", repr(of["hidden_activation"]), DEFAULTS["hidden_activation"])
    if of.get("use_bidirectional_attention"):
        checks.fail("use_bidirectional_attention", True, "false: this is a language model")
    attention = {
        "kind": "attention",
        "heads": of["num_attention_heads"],
        "kv_heads": of["num_key_value_heads"],
        "head_dim": of["head_dim"],
        "scale": of["query_pre_attn_scalar"] ** -0.5,
        "logits_soft_cap": of.get("attn_logit_softcapping"),
        "qk_norm": "rms_about_one",
        "norm_eps": of["rms_norm_eps"],
        "bias": of["attention_bias"],
        "out_bias": of["attention_bias"],
    }
    return {
        "vocab_size": of["vocab_size"],
        "dim": of["hidden_size"],
        "mlp_dim": of["intermediate_size"],
        "mlp_options": {"activation": "gelu_tanh"},
        "mixers": {
            "local": attention | rotation(config, LOCAL) | {"window": of["sliding_window"]},
            "global": attention | rotation(config, "full_attention"),
        },
        "norm": "rms_about_one",
        "post_norm": True,
        "norm_eps": of["rms_norm_eps"],
        "embedding_scale": math.sqrt(of["hidden_size"]),
        "logits_soft_cap": of.get("final_logit_softcapping"),
        "tie_embeddings": of["tie_word_embeddings"],
    }


def outside(config: Config) -> Sequence[Entry]:
    return llama.outside(complete(config))


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer = f"model.layers.{block}"
    mixer, bias = f"{layer}.self_attn", complete(config)["attention_bias"]
    return [
        *norm(f"{layer}.input_layernorm", "norm"),
        *llama.attention(mixer, bias=bias, out_bias=bias),
        *norm(f"{mixer}.q_norm", "mixer.q_norm"),
        *norm(f"{mixer}.k_norm", "mixer.k_norm"),
        *norm(f"{layer}.post_attention_layernorm", "post_norm"),
        *norm(f"{layer}.pre_feedforward_layernorm", "mlp_norm"),
        *llama.gated_mlp(f"{layer}.mlp"),
        *norm(f"{layer}.post_feedforward_layernorm", "mlp_post_norm"),
    ]


FAMILY = Family(("gemma3_text",), blocks, options, outside, inside)
