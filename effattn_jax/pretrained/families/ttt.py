"""TTT-Linear and TTT-MLP (Sun et al. 2024, arXiv:2407.04620), as their authors publish them."""

from collections.abc import Sequence
from typing import Any

from effattn_jax import checks
from effattn_jax.pretrained.entry import Entry, convolution, linear, norm, same
from effattn_jax.pretrained.families import llama
from effattn_jax.pretrained.family import Config, Family
from effattn_jax.pretrained.layout import TAPS, shaped

COLUMN = shaped(lambda shape: (*shape, 1))
"""[H] as [H, 1]."""

ROWS_OF_HEADS = shaped(lambda shape: (shape[0], 1, shape[1]))
"""[H, K] as [H, 1, K]."""

BACKBONE = ("share_qk", "use_gate")
KINDS = ("linear", "mlp")


def blocks(config: Config) -> Sequence[str]:
    """A layer of the file is two blocks where a convolution stands before the rest."""
    layer = ("conv", "ttt") if config.get("pre_conv", False) else ("ttt",)
    return layer * config["num_hidden_layers"]


def options(config: Config) -> dict[str, Any]:
    """
    Raises:
      ValueError: only one of the two things that make the Mamba backbone; another activation or kind of layer.
    """
    if config["ttt_layer_type"] not in KINDS:
        checks.fail("ttt_layer_type", repr(config["ttt_layer_type"]), " or ".join(KINDS))
    if config.get("share_qk", False) != config.get("use_gate", False):
        got = ", ".join(f"{name} {config.get(name, False)}" for name in BACKBONE)
        checks.fail("config.json", got, "both (the Mamba backbone) or neither")
    if config.get("hidden_act", "silu") != "silu":
        checks.fail("hidden_act", repr(config["hidden_act"]), "'silu'")
    ttt = {
        "kind": f"ttt_{config['ttt_layer_type']}",
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "mini_batch": config["mini_batch_size"],
        "base_lr": config["ttt_base_lr"],
        "backbone": "mamba" if config.get("share_qk", False) else "transformer",
        "conv_width": config["conv_kernel"],
        "rope_theta": config["rope_theta"],
        "interleaved": True,
    }
    return {
        "vocab_size": config["vocab_size"],
        "dim": config["hidden_size"],
        "mlp_dim": config["intermediate_size"],
        "mixers": {
            "conv": {"kind": "causal_convolution", "width": config["conv_kernel"], "mlp_dim": 0},
            "ttt": ttt,
        },
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


def outside(config: Config) -> Sequence[Entry]:
    return llama.outside({"tie_word_embeddings": True, **config})


def inside(config: Config, block: int) -> Sequence[Entry]:
    kinds = blocks(config)
    layer = f"model.layers.{kinds[:block].count('ttt')}"
    if kinds[block] == "conv":
        return [*norm(f"{layer}.conv.norm", "norm"), *convolution(f"{layer}.conv.conv", "mixer.conv", bias=True)]
    mixer = f"{layer}.seq_modeling_block"
    return [
        *norm(f"{layer}.seq_norm", "norm"),
        *(shared_query_key(mixer) if config.get("share_qk", False) else query_key(mixer)),
        *linear(f"{mixer}.v_proj", "mixer.v_proj"),
        *linear(f"{mixer}.o_proj", "mixer.out_proj"),
        *norm(f"{mixer}.post_norm", "mixer.norm", bias=True),
        *same(f"{mixer}.learnable_token_idx", "mixer.token_offset"),
        Entry(f"{mixer}.learnable_ttt_lr_weight", ("mixer.lr_proj.kernel",), TAPS),
        Entry(f"{mixer}.learnable_ttt_lr_bias", ("mixer.lr_proj.bias",), COLUMN),
        *same(f"{mixer}.ttt_norm_weight", "mixer.ln_scale"),
        *same(f"{mixer}.ttt_norm_bias", "mixer.ln_bias"),
        *network(mixer, config["ttt_layer_type"]),
        *norm(f"{layer}.ffn_norm", "mlp_norm"),
        *llama.gated_mlp(f"{layer}.mlp"),
    ]


def query_key(mixer: str) -> list[Entry]:
    return [*linear(f"{mixer}.q_proj", "mixer.qk.q_proj"), *linear(f"{mixer}.k_proj", "mixer.qk.k_proj")]


def shared_query_key(mixer: str) -> list[Entry]:
    """And the gate of the Mamba backbone."""
    return [
        *linear(f"{mixer}.q_proj", "mixer.qk.proj"),
        *convolution(f"{mixer}.conv_q", "mixer.qk.q_conv", bias=True),
        *convolution(f"{mixer}.conv_k", "mixer.qk.k_conv", bias=True),
        *linear(f"{mixer}.g_proj", "mixer.gate_proj"),
    ]


def network(mixer: str, kind: str) -> list[Entry]:
    """What every document starts from."""
    layers = {"W1": "W", "b1": "b"} if kind == "linear" else {name: name for name in ("W1", "b1", "W2", "b2")}
    weights = [(theirs, ours) for theirs, ours in layers.items() if theirs.startswith("W")]
    biases = [(theirs, ours) for theirs, ours in layers.items() if theirs.startswith("b")]
    return [
        *(entry for theirs, ours in weights for entry in same(f"{mixer}.{theirs}", f"mixer.{ours}")),
        *(Entry(f"{mixer}.{theirs}", (f"mixer.{ours}",), ROWS_OF_HEADS) for theirs, ours in biases),
    ]


FAMILY = Family(("ttt",), blocks, options, outside, inside)
