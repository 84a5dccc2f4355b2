"""RWKV-7 "Goose" (Peng et al. 2025, arXiv:2503.14456), as its authors publish it.

The first layer has no v0, v1, v2, since its values are the ones that the others mix into theirs. Some files have them
all the same, without effect: they are not read, and not written.
"""

import functools
from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, same
from effattn_jax.pretrained.families import rwkv
from effattn_jax.pretrained.family import Config, Family

RANKS = {
    "d_decay_lora": "decay_rank",
    "d_aaa_lora": "rate_rank",
    "d_mv_lora": "value_rank",
    "d_gate_lora": "gate_rank",
}
AXES = {
    "d_decay_lora": ("att.w1", 1),
    "d_aaa_lora": ("att.a1", 1),
    "d_mv_lora": ("att.v1", 1),
    "d_gate_lora": ("att.g1", 1),
}
LOW_RANK = {"w": "w_proj", "a": "a_proj", "v": "v_mix", "g": "g_proj"}
OF_OTHERS = ("v_mix.up.bias", "v_mix.down.kernel", "v_mix.up.kernel")  # than the first layer


def blocks(config: Config) -> Sequence[str]:
    return ("rwkv7",) * config["n_layer"]


def options(config: Config) -> dict[str, Any]:
    return rwkv.options(config, 7, {ours: config[name] for name, ours in RANKS.items() if name in config})


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer = f"blocks.{block}"
    att, ffn = f"{layer}.att", f"{layer}.ffn"
    low_rank = {c: ours for c, ours in LOW_RANK.items() if block or c != "v"}
    biases = {f"{c}0": f"{ours}.up.bias" for c, ours in low_rank.items() if c != "g"}
    return [
        *rwkv.norms(layer),
        *rwkv.vectors(att, "mixer", {f"x_{c}": f"mu_{c}" for c in "rwkvag"} | biases | {"k_k": "k_k", "k_a": "k_a"}),
        *same(f"{att}.r_k", "mixer.r_k"),
        *(entry for c, ours in low_rank.items() for entry in same(f"{att}.{c}1", f"mixer.{ours}.down.kernel")),
        *(entry for c, ours in low_rank.items() for entry in same(f"{att}.{c}2", f"mixer.{ours}.up.kernel")),
        *rwkv.projections(att, "mixer", "receptance", "key", "value", "output"),
        *rwkv.vectors(ffn, "mlp", {"x_k": "mu_k"}),
        *rwkv.projections(ffn, "mlp", "key", "value"),
    ]


def unused(config: Config, block: int) -> Sequence[str]:
    return () if block else [f"mixer.{name}" for name in OF_OTHERS]


def ignored(config: Config) -> Sequence[str]:
    return (r"blocks\.0\.att\.v[012]",)


FAMILY = Family(
    ("RWKV-7",),
    blocks,
    options,
    rwkv.outside,
    inside,
    ignored,
    unused=unused,
    sizes=functools.partial(rwkv.sizes, 7, ("att.r_k", 1), AXES),
    marks=("blocks.0.att.r_k",),
)
