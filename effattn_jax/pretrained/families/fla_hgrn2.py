"""HGRN2 (Qin et al. 2024, arXiv:2404.07904)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, linear, norm
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.families.fla_lower_bounds import lower_bounds
from effattn_jax.pretrained.family import Config

DEFAULTS = {"num_heads": None, "expand_ratio": 128, "use_lower_bound": True}
NORM_EPS = 1e-5  # in the mixers, whatever the config says
ONLY = {"use_short_conv": False, "elementwise_affine": True}


def mixer(config: Config) -> dict[str, Any]:
    return {
        "head_dim": config["expand_ratio"] or config["hidden_size"] // config["num_heads"],
        "lower_bound": None if config["use_lower_bound"] else 0.0,
        "norm_eps": NORM_EPS,
    }


def tensors(config: Config, below: str) -> Sequence[Entry]:
    return [
        *linear(f"{below}.q_proj", "mixer.q_proj"),
        *linear(f"{below}.f_proj", "mixer.f_proj"),
        *linear(f"{below}.i_proj", "mixer.i_proj"),
        *norm(f"{below}.g_norm", "mixer.norm"),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


FAMILY = fla.family(
    "hgrn2", "hgrn2", DEFAULTS, mixer, tensors, only=ONLY, shared=lambda config: lower_bounds(config, "hgrn2")
)
