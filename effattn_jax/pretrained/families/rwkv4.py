"""RWKV-4 (Peng et al. 2023, arXiv:2305.13048), as its authors publish it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, norm, same
from effattn_jax.pretrained.families import rwkv
from effattn_jax.pretrained.family import Config, Family

AXES = {"dim_att": ("att.key.weight", 0)}


def blocks(config: Config) -> Sequence[str]:
    return ("rwkv4",) * config["n_layer"]


def language_options(
    dim: int, width: int, mlp_dim: int, vocab_size: int, norm_eps: float, tied: bool
) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "mlp": "rwkv5_channel_mix",
        "mlp_dim": mlp_dim,
        "mixers": {"rwkv4": {"width": width}},
        "norm": "layer",
        "norm_eps": norm_eps,
        "embedding_norm": True,
        "tie_embeddings": tied,
    }


def tensors(layer: str, att: str, ffn: str, mix: Callable[[str], str]) -> Sequence[Entry]:
    """`mix` is the name of the shares of r, k and v."""
    return [
        *norm(f"{layer}.ln1", "norm", bias=True),
        *norm(f"{layer}.ln2", "mlp_norm", bias=True),
        *rwkv.vectors(att, "mixer", {mix(c): f"mu_{c}" for c in "rkv"}),
        *same(f"{att}.time_decay", "mixer.w"),
        *same(f"{att}.time_first", "mixer.u"),
        *rwkv.projections(att, "mixer", "receptance", "key", "value", "output"),
        *rwkv.vectors(ffn, "mlp", {mix(c): f"mu_{c}" for c in "rk"}),
        *rwkv.projections(ffn, "mlp", "receptance", "key", "value"),
    ]


def options(config: Config) -> dict[str, Any]:
    sizes = (config["n_embd"], config.get("dim_att", config["n_embd"]), config["dim_ffn"], config["vocab_size"])
    return language_options(*sizes, rwkv.NORM_EPS, tied=False)


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer = f"blocks.{block}"
    return tensors(layer, f"{layer}.att", f"{layer}.ffn", lambda c: f"time_mix_{c}")


FAMILY = Family(
    ("RWKV-4",),
    blocks,
    options,
    rwkv.outside,
    inside,
    sizes=functools.partial(rwkv.sizes, 4, None, AXES),
    marks=("blocks.0.att.time_first", "blocks.0.att.time_mix_k"),
)
