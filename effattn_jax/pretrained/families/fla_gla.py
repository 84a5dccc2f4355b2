"""Gated linear attention (Yang et al. 2023, arXiv:2312.06635)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, linear, norm
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.family import Config

DEFAULTS = {
    "num_heads": 4,
    "num_kv_heads": None,
    "expand_k": 0.5,
    "expand_v": 1.0,
    "use_short_conv": False,
    "conv_size": 4,
    "use_output_gate": True,
    "clamp_min": None,
    "fuse_norm": True,
}


def mixer(config: Config) -> dict[str, Any]:
    return {
        "heads": config["num_heads"],
        "kv_heads": config["num_kv_heads"],
        "expand_k": config["expand_k"],
        "expand_v": config["expand_v"],
        "conv_width": config["conv_size"] if config["use_short_conv"] else None,
        "gate_floor": config["clamp_min"],
        "output_gate": config["use_output_gate"],
        "norm_eps": config["norm_eps"],
    }


def tensors(config: Config, below: str) -> Sequence[Entry]:
    gated = config["use_output_gate"]
    fused = gated and config["fuse_norm"]  # the norm that multiplies by the gate has a name of its own
    return [
        *fla.projections(below),
        *(fla.convolutions(below) if config["use_short_conv"] else []),
        *fla.low_rank(f"{below}.gk_proj", "mixer.decay_proj", bias=True),
        *(linear(f"{below}.g_proj", "mixer.gate_proj") if gated else []),
        *norm(f"{below}.{'g_norm_swish_gate' if fused else 'g_norm'}", "mixer.norm"),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


FAMILY = fla.family("gla", "gla", DEFAULTS, mixer, tensors, only={"feature_map": None, "elementwise_affine": True})
