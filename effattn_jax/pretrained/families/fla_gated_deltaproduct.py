"""Gated DeltaProduct (Siems et al. 2025, arXiv:2502.10297)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, linear, norm
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.families.fla_gated_deltanet import decay
from effattn_jax.pretrained.family import Config

DEFAULTS = {
    "num_hidden_layers": 21,
    "num_heads": 6,
    "head_dim": 256,
    "expand_v": 2.0,
    "conv_size": 4,
    "num_householder": 1,
    "use_forget_gate": False,
    "use_output_gate": True,
    "allow_neg_eigval": False,
}


def mixer(config: Config) -> dict[str, Any]:
    return {
        "householders": config["num_householder"],
        "heads": config["num_heads"],
        "head_dim": config["head_dim"],
        "expand_v": config["expand_v"],
        "conv_width": config["conv_size"],
        "allow_negative_eigenvalues": config["allow_neg_eigval"],
        "forget_gate": config["use_forget_gate"],
        "output_gate": config["use_output_gate"],
        "norm_eps": config["norm_eps"],
    }


def tensors(config: Config, below: str) -> Sequence[Entry]:
    return [
        *fla.short_qkv(below),
        *(decay(below) if config["use_forget_gate"] else []),
        *linear(f"{below}.b_proj", "mixer.b_proj"),
        *(linear(f"{below}.g_proj", "mixer.g_proj") if config["use_output_gate"] else []),
        *norm(f"{below}.o_norm", "mixer.norm"),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


FAMILY = fla.family(
    "gated_deltaproduct", "gated_delta_product", DEFAULTS, mixer, tensors, only={"use_short_conv": True}
)
