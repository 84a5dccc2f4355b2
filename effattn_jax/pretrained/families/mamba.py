"""Mamba (Gu & Dao 2023, arXiv:2312.00752) and Falcon Mamba (Zuo et al. 2024, arXiv:2410.05355), with norms in it."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, convolution, linear, norm, same
from effattn_jax.pretrained.family import Config, Family


def blocks(config: Config) -> Sequence[str]:
    return ("mamba",) * config["num_hidden_layers"]


def options(config: Config) -> dict[str, Any]:
    falcon = config["model_type"] == "falcon_mamba"
    mixer = {
        "inner_dim": config["intermediate_size"],
        "state_dim": config["state_size"],
        "dt_rank": config["time_step_rank"],
        "conv_width": config["conv_kernel"],
        "norm": "weightless" if falcon else "none",
        "norm_eps": config.get("mixer_rms_eps", 1e-6),
    }
    return {
        "vocab_size": config["vocab_size"],
        "dim": config["hidden_size"],
        "mlp_dim": 0,
        "mixers": {"mamba": mixer},
        "norm_eps": config["layer_norm_epsilon"],
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


def outside(config: Config) -> Sequence[Entry]:
    return [
        *same("backbone.embeddings.weight", "embedding"),
        *norm("backbone.norm_f", "final_norm"),
        *([] if config.get("tie_word_embeddings", True) else linear("lm_head", "head")),
    ]


def mixer_entries(below: str, *, norms: bool = False) -> list[Entry]:
    """The tensors of `effattn_jax.layers.Mamba`; with `norms` those of Jamba's too."""
    named = [("dt_layernorm", "dt_norm"), ("b_layernorm", "B_norm"), ("c_layernorm", "C_norm")]
    return [
        *linear(f"{below}.in_proj", "mixer.x_proj", "mixer.z_proj"),
        *convolution(f"{below}.conv1d", "mixer.conv", bias=True),
        *linear(f"{below}.x_proj", "mixer.dt_down", "mixer.B_proj", "mixer.C_proj"),
        *linear(f"{below}.dt_proj", "mixer.dt_up"),
        *same(f"{below}.dt_proj.bias", "mixer.dt_bias"),
        *same(f"{below}.A_log", "mixer.A_log"),
        *same(f"{below}.D", "mixer.D"),
        *linear(f"{below}.out_proj", "mixer.out_proj"),
        *(entry for theirs, ours in named if norms for entry in norm(f"{below}.{theirs}", f"mixer.{ours}")),
    ]


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer = f"backbone.layers.{block}"
    return [*norm(f"{layer}.norm", "norm"), *mixer_entries(f"{layer}.mixer")]


FAMILY = Family(("mamba", "falcon_mamba"), blocks, options, outside, inside)
