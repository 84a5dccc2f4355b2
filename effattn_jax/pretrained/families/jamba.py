"""Jamba: one block of attention in eight of Mamba, experts in every second (Lieber et al. 2024, arXiv:2403.19887)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, linear, norm, same
from effattn_jax.pretrained.families import llama
from effattn_jax.pretrained.families.mamba import mixer_entries
from effattn_jax.pretrained.family import Config, Family


def blocks(config: Config) -> Sequence[str]:
    """Mixer and feed-forward layer: "mamba dense", "attention sparse", ..."""
    at = lambda i, part: i % config[f"{part}_layer_period"] == config[f"{part}_layer_offset"]  # noqa: E731
    sparse = config["num_experts"] > 1
    return [
        f"{'attention' if at(i, 'attn') else 'mamba'} {'sparse' if sparse and at(i, 'expert') else 'dense'}"
        for i in range(config["num_hidden_layers"])
    ]


def options(config: Config) -> dict[str, Any]:
    dt_rank = config["mamba_dt_rank"]
    mixers = {
        "attention": {
            "kind": "attention",
            "heads": config["num_attention_heads"],
            "kv_heads": config["num_key_value_heads"],
            "rope_theta": None,
        },
        "mamba": {
            "kind": "mamba",
            "expand": config["mamba_expand"],
            "state_dim": config["mamba_d_state"],
            "dt_rank": None if dt_rank == "auto" else dt_rank,
            "conv_width": config["mamba_d_conv"],
            "norm": "learned",
            "norm_eps": config["rms_norm_eps"],
        },
    }
    experts = {"experts": config["num_experts"], "top_k": config["num_experts_per_tok"], "renormalise": False}
    sparse = {"mlp": "moe", "mlp_options": experts}
    return {
        "vocab_size": config["vocab_size"],
        "dim": config["hidden_size"],
        "mlp_dim": config["intermediate_size"],
        "mixers": {
            f"{mixer} {mlp}": given | (sparse if mlp == "sparse" else {})
            for mixer, given in mixers.items()
            for mlp in ("dense", "sparse")
        },
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def outside(config: Config) -> Sequence[Entry]:
    return [
        *same("model.embed_tokens.weight", "embedding"),
        *norm("model.final_layernorm", "final_norm"),
        *([] if config.get("tie_word_embeddings", False) else linear("lm_head", "head")),
    ]


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer = f"model.layers.{block}"
    mixer, mlp = blocks(config)[block].split()
    feed_forward = f"{layer}.feed_forward"
    return [
        *norm(f"{layer}.input_layernorm", "norm"),
        *(
            llama.attention(f"{layer}.self_attn")
            if mixer == "attention"
            else mixer_entries(f"{layer}.mamba", norms=True)
        ),
        *norm(f"{layer}.pre_ff_layernorm", "mlp_norm"),
        *(
            [*llama.router(f"{feed_forward}.router"), *llama.experts(f"{feed_forward}.experts", config["num_experts"])]
            if mlp == "sparse"
            else llama.gated_mlp(feed_forward)
        ),
    ]


FAMILY = Family(("jamba",), blocks, options, outside, inside)
