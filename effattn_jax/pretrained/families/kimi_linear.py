"""Kimi Linear: three blocks of KDA to one of latent attention without positions, experts (arXiv:2510.26692)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, convolution, linear, norm, same
from effattn_jax.pretrained.families import llama
from effattn_jax.pretrained.family import Config, Family
from effattn_jax.pretrained.layout import shaped


def blocks(config: Config) -> Sequence[str]:
    """Mixer and feed-forward layer. The published config counts layers from 1 in `linear_attn_config`."""
    count = config["num_hidden_layers"]
    if "linear_attn_config" in config:
        full = {i - 1 for i in config["linear_attn_config"]["full_attn_layers"]}
    else:
        full = {i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"}
    if "mlp_layer_types" in config:
        sparse = {i for i, kind in enumerate(config["mlp_layer_types"]) if kind == "sparse"}
    else:
        dense, every = config["first_k_dense_replace"], config.get("moe_layer_freq", 1)
        sparse = {i for i in range(dense, count) if i % every == 0}
    return [f"{'mla' if i in full else 'kda'} {'sparse' if i in sparse else 'dense'}" for i in range(count)]


def options(config: Config) -> dict[str, Any]:
    linear_config = config.get("linear_attn_config", {})
    of_kda = lambda theirs, ours: linear_config.get(theirs, config.get(ours))  # noqa: E731
    head_dim = of_kda("head_dim", "linear_head_dim")
    mixers = {
        "kda": {
            "kind": "kda",
            "heads": of_kda("num_heads", "linear_num_heads"),
            "head_dim": head_dim,
            "conv_width": of_kda("short_conv_kernel_size", "linear_conv_kernel_dim"),
            "gate_rank": head_dim,
            "norm_eps": config["rms_norm_eps"],
        },
        "mla": {
            "kind": "mla",
            "heads": config["num_attention_heads"],
            "latent_dim": config["kv_lora_rank"],
            "query_rank": config.get("q_lora_rank"),
            "key_dim": config["qk_nope_head_dim"],
            "rope_dim": config["qk_rope_head_dim"],
            "value_dim": config["v_head_dim"],
            "rope_theta": None,
            "norm_eps": 1e-6,  # of the latent, whatever the config says of the others
        },
    }
    sparse = {
        "mlp_dim": config["moe_intermediate_size"],
        "mlp": "moe",
        "mlp_options": {
            "experts": config["num_experts"],
            "top_k": config["num_experts_per_token"],
            "score": config.get("moe_router_activation_func", "sigmoid"),
            "renormalise": config["moe_renormalize"],
            "correction": True,
            "groups": config.get("num_expert_group", 1),
            "top_groups": config.get("topk_group", 1),
            "scale": config["routed_scaling_factor"],
            "shared_dim": config["moe_intermediate_size"] * config["num_shared_experts"],
        },
    }
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


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer = f"model.layers.{block}"
    kind, mlp = blocks(config)[block].split()
    mixer, experts = f"{layer}.self_attn", f"{layer}.block_sparse_moe"
    mixers = {"kda": kda(mixer), "mla": mla(mixer, config)}
    feed_forwards = {
        "dense": llama.gated_mlp(f"{layer}.mlp"),
        "sparse": [
            *llama.router(f"{experts}.gate"),
            *same(f"{experts}.gate.e_score_correction_bias", "mlp.router.correction"),
            *llama.experts(f"{experts}.experts", config["num_experts"], ("w1", "w3", "w2")),
            *llama.gated_mlp(f"{experts}.shared_experts", "mlp.shared"),
        ],
    }
    return [
        *norm(f"{layer}.input_layernorm", "norm"),
        *mixers[kind],
        *norm(f"{layer}.post_attention_layernorm", "mlp_norm"),
        *feed_forwards[mlp],
    ]


def kda(below: str) -> list[Entry]:
    per_head = shaped(lambda shape: (1, 1, *shape, 1))
    return [
        *(entry for x in "qkv" for entry in linear(f"{below}.{x}_proj", f"mixer.qkv.{x}_proj")),
        *(entry for x in "qkv" for entry in convolution(f"{below}.{x}_conv1d", f"mixer.qkv.{x}_conv")),
        Entry(f"{below}.A_log", ("mixer.decay.A_log",), per_head),
        *same(f"{below}.dt_bias", "mixer.decay.dt_bias"),
        *linear(f"{below}.f_a_proj", "mixer.f_proj.down"),
        *linear(f"{below}.f_b_proj", "mixer.f_proj.up"),
        *linear(f"{below}.b_proj", "mixer.b_proj"),
        *linear(f"{below}.g_a_proj", "mixer.g_proj.down"),
        *linear(f"{below}.g_b_proj", "mixer.g_proj.up"),
        *norm(f"{below}.o_norm", "mixer.norm"),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


def mla(below: str, config: Config) -> list[Entry]:
    """The tensors of `effattn_jax.layers.LatentAttention`, as DeepSeek names them."""
    if config.get("q_lora_rank"):
        queries = [
            *linear(f"{below}.q_a_proj", "mixer.q_down"),
            *norm(f"{below}.q_a_layernorm", "mixer.q_norm"),
            *linear(f"{below}.q_b_proj", "mixer.q_proj"),
        ]
    else:
        queries = linear(f"{below}.q_proj", "mixer.q_proj")
    return [
        *queries,
        *linear(f"{below}.kv_a_proj_with_mqa", "mixer.kv_down"),
        *norm(f"{below}.kv_a_layernorm", "mixer.kv_norm"),
        *linear(f"{below}.kv_b_proj", "mixer.kv_up"),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


FAMILY = Family(("kimi_linear",), blocks, options, llama.outside, inside)
