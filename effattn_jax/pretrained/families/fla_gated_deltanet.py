"""Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, linear, norm, same
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.family import Config

DEFAULTS = {
    "num_hidden_layers": 21,
    "num_heads": 6,
    "num_v_heads": None,
    "head_dim": 256,
    "expand_v": 2.0,
    "conv_size": 4,
    "use_gate": True,
    "allow_neg_eigval": False,
}
ONLY = {"use_short_conv": True, "output_gate_activation": "swish"}


def mixer(config: Config) -> dict[str, Any]:
    return {
        "heads": config["num_heads"],
        "value_heads": config["num_v_heads"],
        "head_dim": config["head_dim"],
        "expand_v": config["expand_v"],
        "conv_width": config["conv_size"],
        "allow_negative_eigenvalues": config["allow_neg_eigval"],
        "output_gate": config["use_gate"],
        "norm_eps": config["norm_eps"],
    }


def decay(below: str) -> list[Entry]:
    """The gate a memory forgets by."""
    return [
        *linear(f"{below}.a_proj", "mixer.a_proj"),
        *same(f"{below}.A_log", "mixer.decay.A_log"),
        *same(f"{below}.dt_bias", "mixer.decay.dt_bias"),
    ]


def tensors(config: Config, below: str) -> Sequence[Entry]:
    return [
        *fla.short_qkv(below),
        *decay(below),
        *linear(f"{below}.b_proj", "mixer.b_proj"),
        *(linear(f"{below}.g_proj", "mixer.g_proj") if config["use_gate"] else []),
        *norm(f"{below}.o_norm", "mixer.norm"),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


FAMILY = fla.family("gated_deltanet", "gated_delta_net", DEFAULTS, mixer, tensors, only=ONLY)
