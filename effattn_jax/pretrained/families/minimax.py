"""MiniMax-01: seven blocks of lightning attention to one of softmax, experts in all (arXiv:2501.08313)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effattn_jax.pretrained.entry import Entry, linear, norm
from effattn_jax.pretrained.families import llama
from effattn_jax.pretrained.family import Config, Family
from effattn_jax.pretrained.rope import rope_options


def blocks(config: Config) -> Sequence[str]:
    """From `layer_types`, else `attn_type_list` of the published files, where 1 is softmax."""
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if kind else "linear_attention" for kind in config["attn_type_list"]]
    return ["attention" if kind == "full_attention" else "lightning" for kind in kinds]


def factor(config: Config, ours: str, theirs: str) -> float:
    """The published files say `layernorm_..._alpha` where transformers says `..._alpha_factor`."""
    return float(config.get(f"{ours}_factor", config.get(f"layernorm_{theirs}", 1.0)))


def options(config: Config) -> dict[str, Any]:
    heads, head_dim = config["num_attention_heads"], _head_dim(config)
    rotation = rope_options(config)
    rotation["rope_fraction"] = config.get("rotary_dim", head_dim) / head_dim

    def residual(kind: str, theirs: str) -> dict[str, Any]:
        scale = lambda name: factor(config, f"{kind}_{name}", f"{theirs}_{name}")  # noqa: E731
        return {"skip": scale("alpha"), "branch": scale("beta"), "normed": True}

    experts = {"experts": config["num_local_experts"], "top_k": config["num_experts_per_tok"], "renormalise": True}
    return {
        "vocab_size": config["vocab_size"],
        "dim": config["hidden_size"],
        "mlp_dim": config["intermediate_size"],
        "mlp": "moe",
        "mlp_options": experts,
        "mixers": {
            "attention": {
                "heads": heads,
                "kv_heads": config["num_key_value_heads"],
                "head_dim": head_dim,
                "residual": residual("full_attn", "full_attention"),
                **rotation,
            },
            "lightning": {
                "heads": heads,
                "head_dim": head_dim,
                "norm_eps": 1e-6,  # whatever the config says of the others
                "residual": residual("linear_attn", "linear_attention"),
            },
        },
        "mlp_residual": residual("mlp", "mlp"),
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer = f"model.layers.{block}"
    mixer, experts = f"{layer}.self_attn", f"{layer}.block_sparse_moe"
    lightning = [
        *linear(f"{mixer}.qkv_proj", "mixer.qkv_proj"),
        *linear(f"{mixer}.output_gate", "mixer.gate_proj"),
        *norm(f"{mixer}.norm", "mixer.norm"),
        *linear(f"{mixer}.out_proj", "mixer.out_proj"),
    ]
    return [
        *norm(f"{layer}.input_layernorm", "norm"),
        *(lightning if blocks(config)[block] == "lightning" else llama.attention(mixer)),
        *norm(f"{layer}.post_attention_layernorm", "mlp_norm"),
        *llama.router(f"{experts}.gate"),
        *llama.experts(f"{experts}.experts", config["num_local_experts"], ("w1", "w3", "w2")),
    ]


def constants(config: Config) -> Mapping[str, np.ndarray]:
    """Decays of lightning attention within a block, which transformers keeps in the file."""
    found: dict[str, np.ndarray] = {}
    kinds, heads, size = blocks(config), config["num_attention_heads"], config.get("block_size", 256)
    at = np.arange(1, size + 1, dtype=np.float64)
    for layer, kind in enumerate(kinds):
        if kind != "lightning":
            continue
        slopes = 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)
        slopes *= 1 - layer / (len(kinds) - 1 + 1e-5) + 1e-5
        s = slopes[:, None, None]
        later = at[:, None] - at[None, :]
        below = np.where(later >= 0, np.exp(-s * np.maximum(later, 0)), 0)
        parts = {
            "slope_rate": s,
            "query_decay": np.exp(-s * at[:, None]),
            "key_decay": np.exp(-s * (size - at)[:, None]),
            "diagonal_decay": below[None],
        }
        found |= {f"model.layers.{layer}.self_attn.{name}": x.astype(np.float32) for name, x in parts.items()}
    return found


def _head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


FAMILY = Family(("minimax", "minimax_text_01"), blocks, options, llama.outside, inside, constants=constants)
