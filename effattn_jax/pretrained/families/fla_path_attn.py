"""PaTH attention (Yang et al. 2025, arXiv:2505.16381)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, convolution, linear
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.family import Config

DEFAULTS = {"num_heads": 32, "num_kv_heads": None, "use_forget_gate": False, "use_low_rank_w": True}
RANK, WIDTH = 32, 3  # of the projection to w and of its convolution


def mixer(config: Config) -> dict[str, Any]:
    return {
        "heads": config["num_heads"],
        "kv_heads": config["num_kv_heads"],
        "rank": RANK if config["use_low_rank_w"] else None,
        "conv_width": WIDTH,
        "forget_gate": config["use_forget_gate"],
    }


def tensors(config: Config, below: str) -> Sequence[Entry]:
    to_w = fla.low_rank if config["use_low_rank_w"] else linear
    return [
        *fla.projections(below),
        *to_w(f"{below}.w_proj", "mixer.w_proj"),
        *convolution(f"{below}.w_conv1d", "mixer.w_conv"),
        *linear(f"{below}.bt_proj", "mixer.beta_proj", bias=True),
        *(linear(f"{below}.g_proj", "mixer.forget_proj", bias=True) if config["use_forget_gate"] else []),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


FAMILY = fla.family("path_attn", "path", DEFAULTS, mixer, tensors, only={"use_w_shortconv": True})
