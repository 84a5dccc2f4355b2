"""Qwen3-Next: three blocks of gated DeltaNet to one of gated softmax attention, experts (Qwen team, 2025)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, convolution, linear, norm, same
from effattn_jax.pretrained.families import llama
from effattn_jax.pretrained.family import Config, Family
from effattn_jax.pretrained.layout import head_rows
from effattn_jax.pretrained.rope import rope_options


def blocks(config: Config) -> Sequence[str]:
    """Mixer and feed-forward layer."""
    count, every = config["num_hidden_layers"], config.get("full_attention_interval", 4)
    kinds = config.get("layer_types") or [
        "linear_attention" if (i + 1) % every else "full_attention" for i in range(count)
    ]
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    sparse = [config["num_experts"] > 0 and (i + 1) % step == 0 and i not in dense for i in range(count)]
    return [
        f"{'attention' if kind == 'full_attention' else 'delta'} {'sparse' if there else 'dense'}"
        for kind, there in zip(kinds, sparse, strict=True)
    ]


def options(config: Config) -> dict[str, Any]:
    mixers = {
        "attention": {
            "kind": "attention",
            "heads": config["num_attention_heads"],
            "kv_heads": config["num_key_value_heads"],
            "head_dim": config["head_dim"],
            "qk_norm": "rms_about_one",
            "norm_eps": config["rms_norm_eps"],
            "gate": True,
            "bias": config.get("attention_bias", False),
            "out_bias": config.get("attention_bias", False),
            **rope_options(config),
        },
        "delta": {
            "kind": "gated_delta_net",
            "heads": config["linear_num_key_heads"],
            "value_heads": config["linear_num_value_heads"],
            "head_dim": config["linear_key_head_dim"],
            "expand_v": config["linear_value_head_dim"] / config["linear_key_head_dim"],
            "conv_width": config["linear_conv_kernel_dim"],
            "norm_eps": config["rms_norm_eps"],
        },
    }
    sparse = {
        "mlp_dim": config["moe_intermediate_size"],
        "mlp": "moe",
        "mlp_options": {
            "experts": config["num_experts"],
            "top_k": config["num_experts_per_tok"],
            "renormalise": config["norm_topk_prob"],
            "shared_dim": config["shared_expert_intermediate_size"],
            "shared_gate": True,
        },
    }
    return {
        "vocab_size": config["vocab_size"],
        "dim": config["hidden_size"],
        "mlp_dim": config["intermediate_size"],
        "norm": "rms_about_one",
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
    experts = f"{layer}.mlp"
    mixers = {
        "attention": attention(f"{layer}.self_attn", config),
        "delta": delta(f"{layer}.linear_attn", config["linear_num_key_heads"]),
    }
    feed_forwards = {
        "dense": llama.gated_mlp(experts),
        "sparse": [
            *llama.router(f"{experts}.gate"),
            *llama.experts(f"{experts}.experts", config["num_experts"]),
            *llama.gated_mlp(f"{experts}.shared_expert", "mlp.shared"),
            *linear(f"{experts}.shared_expert_gate", "mlp.shared_gate"),
        ],
    }
    return [
        *norm(f"{layer}.input_layernorm", "norm"),
        *mixers[kind],
        *norm(f"{layer}.post_attention_layernorm", "mlp_norm"),
        *feed_forwards[mlp],
    ]


def attention(below: str, config: Config) -> list[Entry]:
    """Each head's rows of q_proj are its query and then its gate."""
    heads, bias = config["num_attention_heads"], config.get("attention_bias", False)
    return [
        *linear(f"{below}.q_proj", "mixer.q_proj", "mixer.gate_proj", layout=head_rows(heads)),
        *linear(f"{below}.k_proj", "mixer.k_proj", bias=bias),
        *linear(f"{below}.v_proj", "mixer.v_proj", bias=bias),
        *norm(f"{below}.q_norm", "mixer.q_norm"),
        *norm(f"{below}.k_norm", "mixer.k_norm"),
        *linear(f"{below}.o_proj", "mixer.out_proj", bias=bias),
    ]


def delta(below: str, key_heads: int) -> list[Entry]:
    """Projections lie key head by key head, the convolution's channels q, k, v one after the other."""
    by_head = head_rows(key_heads)
    qkv = [f"mixer.qkv.{x}_proj" for x in "qkv"]
    return [
        *linear(f"{below}.in_proj_qkvz", *qkv, "mixer.g_proj", layout=by_head),
        *linear(f"{below}.in_proj_ba", "mixer.b_proj", "mixer.a_proj", layout=by_head),
        *convolution(f"{below}.conv1d", *(f"mixer.qkv.{x}_conv" for x in "qkv")),
        *same(f"{below}.A_log", "mixer.decay.A_log"),
        *same(f"{below}.dt_bias", "mixer.decay.dt_bias"),
        *norm(f"{below}.norm", "mixer.norm"),
        *linear(f"{below}.out_proj", "mixer.out_proj"),
    ]


FAMILY = Family(("qwen3_next",), blocks, options, llama.outside, inside)
