"""Linear attention with learned features (Kasai et al. 2021, arXiv:2103.13076, and others)."""

from collections.abc import Sequence
from typing import Any

from effattn_jax import checks
from effattn_jax.pretrained.entry import Entry, linear, norm
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.family import Config
from effattn_jax.pretrained.layout import Layout, shaped

DEFAULTS = {
    "num_heads": 4,
    "num_kv_heads": None,
    "expand_k": 1.0,
    "expand_v": 1.0,
    "feature_map": "elementwise_product",
    "tie_feature_map_qk": False,
}
ONLY = {"norm_q": False, "norm_k": False, "norm_feature_map": False, "elementwise_affine": True}
FEATURE_MAPS = ("elementwise_product", "elu", "relu", "identity")


def mixer(config: Config) -> dict[str, Any]:
    dim, heads = config["hidden_size"], config["num_heads"]
    if config["feature_map"] not in FEATURE_MAPS:
        checks.fail("feature_map", repr(config["feature_map"]), f"one of {', '.join(FEATURE_MAPS)}")
    return {
        "heads": heads,
        "kv_heads": config["num_kv_heads"],
        "key_dim": int(dim * config["expand_k"]) // heads,
        "value_dim": int(dim * config["expand_v"]) // heads,
        "feature_map": config["feature_map"],
        "tie_feature_map": learned(config) and config["tie_feature_map_qk"],
        "share_feature_map": True,
        "normalise": False,
        "scale": None,
        "output_norm": True,
        "norm_eps": config["norm_eps"],
    }


def learned(config: Config) -> bool:
    return bool(config["feature_map"] == "elementwise_product")


OF_ALL_HEADS = Layout(
    shape=lambda shapes: (shapes[0][2], shapes[0][1]),
    split=lambda tensor, shapes: [tensor.T[None]],
    join=lambda arrays: arrays[0][0].T,
)
"""[1, in, out] as [out, in]."""


def feature_map(below: str, name: str) -> list[Entry]:
    """(x W + b) * (x W' + b')."""
    parts = (("layer1", ""), ("layer2", "other_"))
    without_heads = shaped(lambda shape: shape[1:])
    return [
        entry
        for layer, ours in parts
        for entry in (
            Entry(f"{below}.{layer}.weight", (f"mixer.{name}.{ours}weight",), OF_ALL_HEADS),
            Entry(f"{below}.{layer}.bias", (f"mixer.{name}.{ours}bias",), without_heads),
        )
    ]


def tensors(config: Config, below: str) -> Sequence[Entry]:
    tied = config["tie_feature_map_qk"]
    return [
        *fla.projections(below),
        *(feature_map(f"{below}.feature_map_q", "phi") if learned(config) else []),
        *(feature_map(f"{below}.feature_map_k", "k_phi") if learned(config) and not tied else []),
        *norm(f"{below}.norm", "mixer.norm"),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


FAMILY = fla.family("linear_attn", "linear_attention", DEFAULTS, mixer, tensors, only=ONLY)
