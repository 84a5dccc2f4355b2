"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060), of which Codestral Mamba is one."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, convolution, linear, norm, same
from effattn_jax.pretrained.families.mamba import outside
from effattn_jax.pretrained.family import Config, Family


def blocks(config: Config) -> Sequence[str]:
    return ("mamba2",) * config["num_hidden_layers"]


def options(config: Config) -> dict[str, Any]:
    mixer = {
        "expand": config["expand"],
        "head_dim": config["head_dim"],
        "state_dim": config["state_size"],
        "groups": config["n_groups"],
        "conv_width": config["conv_kernel"],
        "norm_eps": config["layer_norm_epsilon"],
    }
    return {
        "vocab_size": config["vocab_size"],
        "dim": config["hidden_size"],
        "mlp_dim": 0,
        "mixers": {"mamba2": mixer},
        "norm_eps": config["layer_norm_epsilon"],
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer = f"backbone.layers.{block}"
    mixer = f"{layer}.mixer"
    return [
        *norm(f"{layer}.norm", "norm"),
        *linear(f"{mixer}.in_proj", "mixer.z_proj", "mixer.x_proj", "mixer.bc_proj", "mixer.dt_proj"),
        *convolution(f"{mixer}.conv1d", "mixer.x_conv", "mixer.bc_conv", bias=True),
        *same(f"{mixer}.A_log", "mixer.A_log"),
        *same(f"{mixer}.dt_bias", "mixer.dt_bias"),
        *same(f"{mixer}.D", "mixer.D"),
        *norm(f"{mixer}.norm", "mixer.norm"),
        *linear(f"{mixer}.out_proj", "mixer.out_proj"),
    ]


FAMILY = Family(("mamba2",), blocks, options, outside, inside)
