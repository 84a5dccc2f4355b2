"""Comba (Hu et al. 2025, arXiv:2506.02475)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, linear, norm, same
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.families.fla_gated_deltanet import decay
from effattn_jax.pretrained.family import Config

DEFAULTS = {
    "num_hidden_layers": 21,
    "num_heads": 6,
    "num_v_heads": None,
    "head_dim": 256,
    "expand_v": 2.0,
    "conv_size": 4,
    "use_inner_decay": True,
    "use_output_correction": True,
    "correction_factor": 1.0,
    "use_output_gate": True,
}


def mixer(config: Config) -> dict[str, Any]:
    """The kernels of flash-linear-attention bring the feedback vector to length one."""
    return {
        "heads": config["num_heads"],
        "value_heads": config["num_v_heads"],
        "head_dim": config["head_dim"],
        "expand_v": config["expand_v"],
        "conv_width": config["conv_size"],
        "inner_decay": config["use_inner_decay"],
        "output_correction": config["correction_factor"] if config["use_output_correction"] else None,
        "normalize_feedback": True,
        "output_gate": config["use_output_gate"],
        "norm_eps": config["norm_eps"],
    }


def tensors(config: Config, below: str) -> Sequence[Entry]:
    return [
        *fla.short_qkv(below),
        *decay(below),
        *linear(f"{below}.b_proj", "mixer.b_proj"),
        *(same(f"{below}.decay", "mixer.d") if config["use_inner_decay"] else []),
        *(same(f"{below}.D", "mixer.D") if config["use_output_correction"] else []),
        *(linear(f"{below}.g_proj", "mixer.g_proj") if config["use_output_gate"] else []),
        *norm(f"{below}.o_norm", "mixer.norm"),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


FAMILY = fla.family("comba", "comba", DEFAULTS, mixer, tensors, only={"use_short_conv": True})
