"""Kimi Delta Attention (Kimi Linear, 2025, arXiv:2510.26692)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, linear, norm, same
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.family import Config

DEFAULTS = {
    "num_heads": 16,
    "num_v_heads": None,
    "head_dim": 128,
    "expand_v": 1.0,
    "conv_size": 4,
    "allow_neg_eigval": False,
    "lower_bound": None,
}


def mixer(config: Config) -> dict[str, Any]:
    return {
        "heads": config["num_heads"],
        "value_heads": config["num_v_heads"],
        "head_dim": config["head_dim"],
        "expand_v": config["expand_v"],
        "conv_width": config["conv_size"],
        "gate_bias": True,
        "lower_bound": config["lower_bound"],
        "allow_negative_eigenvalues": config["allow_neg_eigval"],
        "norm_eps": config["norm_eps"],
    }


def tensors(config: Config, below: str) -> Sequence[Entry]:
    return [
        *fla.short_qkv(below),
        *fla.low_rank(f"{below}.f_proj", "mixer.f_proj"),
        *same(f"{below}.A_log", "mixer.decay.A_log"),
        *same(f"{below}.dt_bias", "mixer.decay.dt_bias"),
        *linear(f"{below}.b_proj", "mixer.b_proj"),
        *fla.low_rank(f"{below}.g_proj", "mixer.g_proj", bias=True),
        *norm(f"{below}.o_norm", "mixer.norm"),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


FAMILY = fla.family("kda", "kda", DEFAULTS, mixer, tensors, only={"use_short_conv": True})
