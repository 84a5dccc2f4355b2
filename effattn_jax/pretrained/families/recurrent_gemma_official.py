"""RecurrentGemma (Botev et al. 2024, arXiv:2404.07839) under the names of Google's own code, which are those of Griffin
(De et al. 2024, arXiv:2402.19427)."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes

from effattn_jax.pretrained.entry import Entry, linear, same
from effattn_jax.pretrained.families.recurrent_gemma import ROTATED
from effattn_jax.pretrained.family import Config, Family
from effattn_jax.pretrained.layout import STACKED, stacked

NORM_EPS = 1e-6
CONV_WIDTH = 4  # where the config does not say


def blocks(config: Config) -> Sequence[str]:
    return tuple(config["block_types"])


def options(config: Config) -> dict[str, Any]:
    dim, heads = config["width"], config["num_heads"]
    scaled = config.get("embeddings_scale_by_sqrt_dim", True)
    return {
        "vocab_size": config["vocab_size"],
        "dim": dim,
        "mlp_dim": config["mlp_expanded_width"],
        "mlp_options": {"activation": "gelu_tanh", "bias": True},
        "norm": "rms_about_one",
        "norm_eps": NORM_EPS,
        "mixers": {
            "recurrent": {
                "kind": "rg_lru",
                "width": config.get("lru_width") or dim,
                "heads": heads,
                "conv_width": config.get("conv1d_temporal_width", CONV_WIDTH),
            },
            "attention": {
                "heads": heads,
                "kv_heads": 1,
                "head_dim": dim // heads,
                # theirs counts the tokens before the current one, ours that one too
                "window": config["attention_window_size"] + 1,
                "rope_fraction": ROTATED,
                "out_bias": True,
            },
        },
        "tie_embeddings": True,
        "embedding_scale": float(ml_dtypes.bfloat16(dim**0.5)) if scaled else 1.0,  # as the authors round it
        "logits_soft_cap": config.get("logits_soft_cap") or None,
    }


def outside(config: Config) -> Sequence[Entry]:
    return [*same("embedder.input_embedding", "embedding"), *same("final_norm.scale", "final_norm.scale")]


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer = f"blocks.{block}"
    mixers = {"recurrent": recurrent, "attention": attention}
    up = ("mlp.gate", "mlp.up")
    return [
        *same(f"{layer}.temporal_pre_norm.scale", "norm.scale"),
        *mixers[blocks(config)[block]](layer),
        *same(f"{layer}.channel_pre_norm.scale", "mlp_norm.scale"),
        Entry(f"{layer}.mlp_block.ffw_up.w", tuple(f"{x}.kernel" for x in up), STACKED),
        Entry(f"{layer}.mlp_block.ffw_up.b", tuple(f"{x}.bias" for x in up), stacked(between=(1, 1))),
        *linear(f"{layer}.mlp_block.ffw_down", "mlp.down", bias=True),
    ]


def attention(layer: str) -> list[Entry]:
    below = f"{layer}.attention_block"
    return [
        *(entry for x in "qkv" for entry in linear(f"{below}.proj_{x}", f"mixer.{x}_proj")),
        *linear(f"{below}.proj_final", "mixer.out_proj", bias=True),
    ]


def recurrent(layer: str) -> list[Entry]:
    below = f"{layer}.recurrent_block"
    gates = {"input_gate": "input_gate", "a_gate": "recurrence_gate"}
    return [
        *linear(f"{below}.linear_y", "mixer.y_proj", bias=True),
        *linear(f"{below}.linear_x", "mixer.x_proj", bias=True),
        *same(f"{below}.conv_1d.w", "mixer.conv.taps"),
        *same(f"{below}.conv_1d.b", "mixer.conv.bias"),
        *(entry for t, o in gates.items() for entry in same(f"{below}.rg_lru.{t}.w", f"mixer.{o}.kernel")),
        *(entry for t, o in gates.items() for entry in same(f"{below}.rg_lru.{t}.b", f"mixer.{o}.bias")),
        *same(f"{below}.rg_lru.a_param", "mixer.rate"),
        *linear(f"{below}.linear_out", "mixer.out_proj", bias=True),
    ]


FAMILY = Family(("griffin",), blocks, options, outside, inside, fields=("block_types", "mlp_expanded_width"))
