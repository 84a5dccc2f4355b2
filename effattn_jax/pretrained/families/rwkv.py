"""What the releases of RWKV-4 to RWKV-7 share: their authors' names, and sizes that only the tensors tell.

A release is a `.pth` file without a config. Ours has the names that the authors' code has for the sizes.
"""

import re
from collections.abc import Mapping
from typing import Any

from effattn_jax import checks
from effattn_jax.pretrained.entry import Entry, linear, norm, same
from effattn_jax.pretrained.family import Config
from effattn_jax.pretrained.layout import Layout, shaped
from effattn_jax.pretrained.tensors import TensorInfo

NORM_EPS = 1e-5
ROW = shaped(lambda shape: (1, 1, *shape))
"""[D] as [1, 1, D]."""

PROJECTIONS = {
    "receptance": "r_proj",
    "key": "k_proj",
    "value": "v_proj",
    "gate": "g_proj",
    "output": "out_proj",
}

BLOCK = re.compile(r"blocks\.(\d+)\.")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

Axes = Mapping[str, tuple[str, int]]
"""A size's name in the config -> a tensor, without the "blocks.0." before it, and the axis that has the size."""


def options(config: Config, version: int, mixer: Mapping[str, Any]) -> dict[str, Any]:
    """Of `LanguageModel`; `mixer` are those of the time mix beside the size of its heads."""
    return {
        "vocab_size": config["vocab_size"],
        "dim": config["n_embd"],
        "mlp": f"rwkv{version}_channel_mix",
        "mlp_dim": config["dim_ffn"],
        "mixers": {f"rwkv{version}": {"head_dim": config["head_size"], **mixer}},
        "norm": "layer",
        "norm_eps": NORM_EPS,
        "embedding_norm": True,
        "tie_embeddings": False,
    }


def outside(config: Config) -> list[Entry]:
    return [
        *same("emb.weight", "embedding"),
        *norm("blocks.0.ln0", "embedding_norm", bias=True),
        *norm("ln_out", "final_norm", bias=True),
        *linear("head", "head"),
    ]


def norms(below: str) -> list[Entry]:
    """Those of a block, and of the heads."""
    return [
        *norm(f"{below}.ln1", "norm", bias=True),
        *norm(f"{below}.ln2", "mlp_norm", bias=True),
        *norm(f"{below}.att.ln_x", "mixer.norm", bias=True),
    ]


def projections(below: str, layer: str, *names: str) -> list[Entry]:
    return [entry for name in names for entry in linear(f"{below}.{name}", f"{layer}.{PROJECTIONS[name]}")]


def vectors(below: str, layer: str, names: Mapping[str, str], layout: Layout = ROW) -> list[Entry]:
    """By their names in the file and ours."""
    return [Entry(f"{below}.{theirs}", (f"{layer}.{ours}",), layout) for theirs, ours in names.items()]


def by_head(config: Config) -> Layout:
    """[H N] as [H, N]."""
    size = config["head_size"]
    return shaped(lambda shape: (shape[0] // size, size))


def sizes(version: int, heads: tuple[str, int] | None, axes: Axes, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config from the tensors; the size of heads, where there are any, and those of `axes` are where they are told
    to be.

    Raises:
      ValueError: a size that no tensor has.
    """
    by_name, blocks = dict[str, TensorInfo](), set[str]()
    for name, info in tensors.items():
        by_name[BLOCK.sub("", name)] = info
        blocks |= {number[1] for number in [BLOCK.match(name)] if number}

    def size(tensor: str, axis: int) -> int:
        shape = by_name[tensor].shape if tensor in by_name else ()
        if axis >= len(shape):
            checks.fail("tensors", f"no {tensor} of {axis + 1} dimensions", f"those of RWKV-{version}")
        return int(shape[axis])

    vocab_size, dim = size("emb.weight", 0), size("emb.weight", 1)
    head_size = None if heads is None else size(*heads)
    dtype = by_name["emb.weight"].dtype
    return {
        "version": str(version),
        "vocab_size": vocab_size,
        "n_embd": dim,
        **({} if head_size is None else {"n_head": dim // max(head_size, 1), "head_size": head_size}),
        "n_layer": len(blocks),
        "dim_ffn": size("ffn.key.weight", 0),
        **{name: size(*place) for name, place in axes.items() if place[0] in by_name},
        **({"dtype": DTYPES[dtype]} if dtype in DTYPES else {}),
    }
