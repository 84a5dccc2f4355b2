"""RWKV-5 "Eagle" (Peng et al. 2024, arXiv:2404.05892), as its authors publish it: version 5.2, with a gate and a decay
per channel."""

import functools
from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry
from effattn_jax.pretrained.families import rwkv
from effattn_jax.pretrained.family import Config, Family


def blocks(config: Config) -> Sequence[str]:
    return ("rwkv5",) * config["n_layer"]


def options(config: Config) -> dict[str, Any]:
    return rwkv.options(config, 5, {})


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer = f"blocks.{block}"
    att, ffn = f"{layer}.att", f"{layer}.ffn"
    return [
        *rwkv.norms(layer),
        *rwkv.vectors(att, "mixer", {f"time_mix_{c}": f"mu_{c}" for c in "rkvg"}),
        *rwkv.vectors(att, "mixer", {"time_decay": "w", "time_faaaa": "u"}, rwkv.by_head(config)),
        *rwkv.projections(att, "mixer", "receptance", "key", "value", "gate", "output"),
        *rwkv.vectors(ffn, "mlp", {f"time_mix_{c}": f"mu_{c}" for c in "rk"}),
        *rwkv.projections(ffn, "mlp", "receptance", "key", "value"),
    ]


FAMILY = Family(
    ("RWKV-5",),
    blocks,
    options,
    rwkv.outside,
    inside,
    sizes=functools.partial(rwkv.sizes, 5, ("att.time_faaaa", 1), {}),
    marks=("blocks.0.att.time_mix_g",),
)
