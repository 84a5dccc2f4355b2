"""The Forgetting Transformer (Lin et al. 2025, arXiv:2503.02130)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, linear, norm
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.family import Config

DEFAULTS = {
    "num_heads": 32,
    "num_kv_heads": None,
    "qkv_bias": False,
    "qk_norm": False,
    "use_output_gate": False,
}
QK_NORM_EPS = 1e-5  # whatever the config says


def mixer(config: Config) -> dict[str, Any]:
    return {
        "heads": config["num_heads"],
        "kv_heads": config["num_kv_heads"],
        "bias": config["qkv_bias"],
        "qk_norm": config["qk_norm"],
        "output_gate": config["use_output_gate"],
        "norm_eps": QK_NORM_EPS,
    }


def tensors(config: Config, below: str) -> Sequence[Entry]:
    norms = [*norm(f"{below}.q_norm", "mixer.q_norm"), *norm(f"{below}.k_norm", "mixer.k_norm")]
    return [
        *fla.projections(below, bias=config["qkv_bias"]),
        *linear(f"{below}.f_proj", "mixer.forget_proj", bias=True),
        *(norms if config["qk_norm"] else []),
        *(linear(f"{below}.g_proj", "mixer.gate_proj") if config["use_output_gate"] else []),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


FAMILY = fla.family("forgetting_transformer", "fox", DEFAULTS, mixer, tensors, only={"window_size": None})
