"""HGRN (Qin et al. 2023, arXiv:2311.04823)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, linear, norm
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.families.fla_lower_bounds import lower_bounds
from effattn_jax.pretrained.family import Config

DEFAULTS = {"expand_ratio": 1, "use_lower_bound": True}
ONLY = {"use_short_conv": False, "elementwise_affine": True}


def mixer(config: Config) -> dict[str, Any]:
    return {
        "expand": config["expand_ratio"],
        "lower_bound": None if config["use_lower_bound"] else 0.0,
        "norm_eps": config["norm_eps"],
    }


def tensors(config: Config, below: str) -> Sequence[Entry]:
    return [
        *linear(f"{below}.i_proj", "mixer.i_proj"),
        *linear(f"{below}.f_proj", "mixer.f_proj"),
        *linear(f"{below}.g_proj", "mixer.g_proj"),
        *norm(f"{below}.g_norm", "mixer.norm"),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


FAMILY = fla.family(
    "hgrn", "hgrn", DEFAULTS, mixer, tensors, only=ONLY, shared=lambda config: lower_bounds(config, "hgrn")
)
