"""Gated slot attention (Zhang et al. 2024, arXiv:2409.07146)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, linear, norm
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.family import Config

DEFAULTS = {
    "gate_logit_normalizer": 8,
    "num_heads": 4,
    "num_kv_heads": None,
    "num_slots": 64,
    "expand_k": 1.0,
    "expand_v": 1.0,
}
NORM_EPS = 1e-5  # in the mixers, whatever the config says
ONLY = {
    "use_short_conv": False,
    "use_output_gate": False,
    "use_norm": True,
    "feature_map": "swish",
    "elementwise_affine": True,
}


def mixer(config: Config) -> dict[str, Any]:
    return {
        "heads": config["num_heads"],
        "kv_heads": config["num_kv_heads"],
        "slots": config["num_slots"],
        "expand_k": config["expand_k"],
        "expand_v": config["expand_v"],
        "gate_temperature": config["gate_logit_normalizer"],
        "norm_eps": NORM_EPS,
    }


def tensors(config: Config, below: str) -> Sequence[Entry]:
    return [
        *fla.projections(below),
        *linear(f"{below}.f_proj", "mixer.f_proj"),
        *norm(f"{below}.g_norm", "mixer.norm"),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


FAMILY = fla.family("gsa", "gsa", DEFAULTS, mixer, tensors, only=ONLY)
