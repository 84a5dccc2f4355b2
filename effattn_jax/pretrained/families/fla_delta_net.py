"""DeltaNet (Yang et al. 2024, arXiv:2406.06484)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, linear, norm
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.family import Config

DEFAULTS = {
    "num_heads": 16,
    "expand_k": 1.0,
    "expand_v": 1.0,
    "conv_size": 4,
    "use_gate": False,
    "allow_neg_eigval": False,
    "qk_norm": "l2",
    "qk_activation": "silu",
}
ONLY = {"use_short_conv": True, "use_beta": True, "use_output_norm": True}


def mixer(config: Config) -> dict[str, Any]:
    dim, heads = config["hidden_size"], config["num_heads"]
    return {
        "heads": heads,
        "head_dim": int(dim * config["expand_k"]) // heads,
        "expand_v": config["expand_v"] / config["expand_k"],
        "conv_width": config["conv_size"],
        "qk_activation": config["qk_activation"],
        "qk_norm": config["qk_norm"],
        "allow_negative_eigenvalues": config["allow_neg_eigval"],
        "output_gate": config["use_gate"],
        "norm_eps": config["norm_eps"],
    }


def tensors(config: Config, below: str) -> Sequence[Entry]:
    return [
        *fla.short_qkv(below),
        *linear(f"{below}.b_proj", "mixer.b_proj"),
        *(linear(f"{below}.g_proj", "mixer.g_proj") if config["use_gate"] else []),
        *norm(f"{below}.o_norm", "mixer.norm"),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


FAMILY = fla.family("delta_net", "delta_net", DEFAULTS, mixer, tensors, only=ONLY)
