"""RetNet (Sun et al. 2023, arXiv:2307.08621)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, linear, norm
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.family import Config

DEFAULTS = {"hidden_ratio": 2, "num_heads": 8, "expand_k": 1.0, "expand_v": 2.0, "fuse_norm": True}
ONLY = {
    "num_kv_heads": None,
    "feature_map": None,
    "use_short_conv": False,
    "use_output_gate": True,
    "elementwise_affine": True,
}


def mixer(config: Config) -> dict[str, Any]:
    """Halves of a head are turned, not neighbours, and the norm has a scale."""
    dim, heads = config["hidden_size"], config["num_heads"]
    return {
        "heads": heads,
        "key_dim": int(dim * config["expand_k"]) // heads,
        "value_dim": int(dim * config["expand_v"]) // heads,
        "rotation": "rope",
        "norm_affine": True,
        "norm_eps": config["norm_eps"],
    }


def tensors(config: Config, below: str) -> Sequence[Entry]:
    return [
        *fla.projections(below),
        *linear(f"{below}.g_proj", "mixer.gate_proj"),
        *norm(f"{below}.{'g_norm_swish_gate' if config['fuse_norm'] else 'g_norm'}", "mixer.norm"),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


FAMILY = fla.family("retnet", "retention", DEFAULTS, mixer, tensors, only=ONLY)
