"""Native sparse attention (Yuan et al. 2025, arXiv:2502.11089) as flash-linear-attention stores it."""

from collections.abc import Sequence
from typing import Any

from effattn_jax import checks
from effattn_jax.pretrained.entry import Entry, linear
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.family import Config

DEFAULTS = {
    "num_heads": 64,
    "num_kv_heads": 4,
    "head_dim": 32,
    "qkv_bias": False,
    "block_size": 64,
    "block_counts": 16,
    "window_size": 512,
    "rope_theta": 10_000.0,
}


def mixer(config: Config) -> dict[str, Any]:
    """The kernel reads as many blocks as the next power of two."""
    if not config["window_size"]:
        checks.fail("window_size", config["window_size"], "at least 1 in models of type 'nsa'")
    return {
        "heads": config["num_heads"],
        "kv_heads": config["num_kv_heads"],
        "head_dim": config["head_dim"],
        "rope_theta": config["rope_theta"],
        "block_size": config["block_size"],
        "topk": 1 << (config["block_counts"] - 1).bit_length(),
        "window": config["window_size"],
        **({"bias": True} if config["qkv_bias"] else {}),
    }


def tensors(config: Config, below: str) -> Sequence[Entry]:
    return [
        *fla.projections(below, bias=config["qkv_bias"]),
        *linear(f"{below}.g_proj", "mixer.gate_proj"),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


FAMILY = fla.family("nsa", "nsa_shared", DEFAULTS, mixer, tensors)
