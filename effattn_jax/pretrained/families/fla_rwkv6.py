"""RWKV-6 (Peng et al. 2024, arXiv:2404.05892) as flash-linear-attention stores it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from effattn_jax import checks
from effattn_jax.pretrained.entry import Entry, linear, norm, same
from effattn_jax.pretrained.families import fla, fla_rwkv
from effattn_jax.pretrained.family import Config, Family
from effattn_jax.pretrained.layout import Arrays, Layout, Shape, shaped

DEFAULTS = {
    **fla_rwkv.COMMON,
    "hidden_ratio": 3.5,
    "num_heads": 4,
    "expand_k": 0.5,
    "expand_v": 1.0,
    "proj_low_rank_dim": 32,
    "gate_low_rank_dim": 64,
}
MIXTURES = ("r", "w", "k", "v", "g")  # in the order of the file; ours is w, k, v, r, g
TO_OURS, TO_THEIRS = [1, 2, 3, 0, 4], [3, 0, 1, 2, 4]


def full(config: Config) -> dict[str, Any]:
    return {**DEFAULTS, **config}


def options(config: Config) -> dict[str, Any]:
    config = full(config)
    fla.supported(config, fla_rwkv.ONLY)
    for name in ("expand_k", "expand_v"):
        if config[name] != 1:
            checks.fail(name, config[name], "1 in models of type 'rwkv6'")
    mixer = {
        "head_dim": config["hidden_size"] // config["num_heads"],
        "mix_rank": config["proj_low_rank_dim"],
        "decay_rank": config["gate_low_rank_dim"],
        "norm_eps": config["norm_eps"],
    }
    return fla_rwkv.options(config, "rwkv6", mixer)


def _down_split(tensor: np.ndarray, shapes: Sequence[Shape]) -> Arrays:
    rows = tensor.reshape(len(MIXTURES), -1, tensor.shape[1])[TO_OURS]
    return [rows.reshape(tensor.shape).T]


def _down_join(arrays: Arrays) -> np.ndarray:
    rows = arrays[0].T.reshape(len(MIXTURES), -1, arrays[0].shape[0])[TO_THEIRS]
    return rows.reshape(arrays[0].shape[::-1])


DOWN = Layout(lambda shapes: shapes[0][::-1], _down_split, _down_join)
"""[D, 5 r] as [5 r, D], mixture by mixture."""


def _up_split(tensor: np.ndarray, shapes: Sequence[Shape]) -> Arrays:
    return [tensor.reshape(len(tensor), len(MIXTURES), -1)[:, TO_OURS].transpose(1, 2, 0)]


def _up_join(arrays: Arrays) -> np.ndarray:
    ranks = arrays[0].transpose(2, 0, 1)[:, TO_THEIRS]
    return ranks.reshape(len(ranks), -1)


UP = Layout(lambda shapes: (shapes[0][2], shapes[0][0] * shapes[0][1]), _up_split, _up_join)
"""[5, r, D] as [D, 5 r]."""

STACKED = Layout(
    shape=lambda shapes: (len(shapes), *shapes[0]),
    split=lambda tensor, shapes: list(tensor),
    join=np.stack,
)
"""Several of one shape, one above the other."""


def time_mix(config: Config, below: str) -> Sequence[Entry]:
    heads = config["num_heads"]
    return [
        Entry(f"{below}.x_bias", tuple(f"mixer.mu_{x}" for x in MIXTURES), STACKED),
        *same(f"{below}.x_proj.0.mu", "mixer.mu_x"),
        *linear(f"{below}.x_proj.0.linear", "mixer.mix_down", layout=DOWN),
        Entry(f"{below}.x_proj.2.weight", ("mixer.mix_up",), UP),
        *linear(f"{below}.w_proj.linear.lora.0", "mixer.w_down"),
        *linear(f"{below}.w_proj.linear.lora.2", "mixer.w_up"),
        *same(f"{below}.w_proj.linear.lora.2.bias", "mixer.w"),
        *(entry for x in "rkvg" for entry in linear(f"{below}.{x}_proj.linear", f"mixer.{x}_proj")),
        Entry(f"{below}.bonus", ("mixer.u",), shaped(lambda shape: (heads, shape[0] // heads))),
        *norm(f"{below}.g_norm", "mixer.norm", bias=True),
        *linear(f"{below}.o_proj", "mixer.out_proj"),
    ]


def inside(config: Config, block: int) -> Sequence[Entry]:
    config, layer = full(config), f"model.layers.{block}"
    return [
        *fla_rwkv.norms(layer),
        *fla.mixer_tensors(config, block, lambda: time_mix(config, f"{layer}.attn")),
        *same(f"{layer}.ffn.key.mu", "mlp.mu_k"),
        *same(f"{layer}.ffn.receptance.mu", "mlp.mu_r"),
        *linear(f"{layer}.ffn.key.linear", "mlp.k_proj"),
        *linear(f"{layer}.ffn.receptance.linear", "mlp.r_proj"),
        *linear(f"{layer}.ffn.value", "mlp.v_proj"),
    ]


FAMILY = Family(
    ("rwkv6",),
    lambda config: fla.blocks(full(config), "rwkv6"),
    options,
    lambda config: fla_rwkv.outside(full(config)),
    inside,
)
