"""RWKV-6 "Finch" (Peng et al. 2024, arXiv:2404.05892), as its authors publish it."""

import functools
from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, same
from effattn_jax.pretrained.families import rwkv
from effattn_jax.pretrained.family import Config, Family

RANKS = {"d_mix_lora": "mix_rank", "d_decay_lora": "decay_rank"}
AXES = {"d_mix_lora": ("att.time_maa_w2", 1), "d_decay_lora": ("att.time_decay_w2", 0)}
MATRICES = {
    "time_maa_w1": "mix_down.kernel",
    "time_maa_w2": "mix_up",
    "time_decay_w1": "w_down.kernel",
    "time_decay_w2": "w_up.kernel",
}


def blocks(config: Config) -> Sequence[str]:
    return ("rwkv6",) * config["n_layer"]


def options(config: Config) -> dict[str, Any]:
    return rwkv.options(config, 6, {ours: config[name] for name, ours in RANKS.items() if name in config})


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer = f"blocks.{block}"
    att, ffn = f"{layer}.att", f"{layer}.ffn"
    return [
        *rwkv.norms(layer),
        *rwkv.vectors(att, "mixer", {f"time_maa_{c}": f"mu_{c}" for c in "xwkvrg"} | {"time_decay": "w"}),
        *rwkv.vectors(att, "mixer", {"time_faaaa": "u"}, rwkv.by_head(config)),
        *(entry for theirs, ours in MATRICES.items() for entry in same(f"{att}.{theirs}", f"mixer.{ours}")),
        *rwkv.projections(att, "mixer", "receptance", "key", "value", "gate", "output"),
        *rwkv.vectors(ffn, "mlp", {f"time_maa_{c}": f"mu_{c}" for c in "rk"}),
        *rwkv.projections(ffn, "mlp", "receptance", "key", "value"),
    ]


FAMILY = Family(
    ("RWKV-6",),
    blocks,
    options,
    rwkv.outside,
    inside,
    sizes=functools.partial(rwkv.sizes, 6, ("att.time_faaaa", 1), AXES),
    marks=("blocks.0.att.time_maa_x",),
)
