"""RWKV-4 (Peng et al. 2023, arXiv:2305.13048), as transformers stores it.

When it evaluates, transformers divides matrices by a power of two every `rescale_every` blocks. Its files hold them
undivided, and norms take the factor out again, so the key is not read.
"""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, linear, norm, same
from effattn_jax.pretrained.families import rwkv, rwkv4
from effattn_jax.pretrained.family import Config, Family

NAMES = {"k": "time_mix_key", "v": "time_mix_value", "r": "time_mix_receptance"}


def blocks(config: Config) -> Sequence[str]:
    return ("rwkv4",) * config["num_hidden_layers"]


def is_tied(config: Config) -> bool:
    return bool(config.get("tie_word_embeddings", False))


def options(config: Config) -> dict[str, Any]:
    dim = config["hidden_size"]
    sizes = (dim, config.get("attention_hidden_size") or dim, config.get("intermediate_size") or 4 * dim)
    eps = config.get("layer_norm_epsilon", rwkv.NORM_EPS)
    return rwkv4.language_options(*sizes, config["vocab_size"], eps, is_tied(config))


def outside(config: Config) -> Sequence[Entry]:
    return [
        *same("rwkv.embeddings.weight", "embedding"),
        *norm("rwkv.blocks.0.pre_ln", "embedding_norm", bias=True),
        *norm("rwkv.ln_out", "final_norm", bias=True),
        *([] if is_tied(config) else linear("head", "head")),
    ]


def inside(config: Config, block: int) -> Sequence[Entry]:
    layer = f"rwkv.blocks.{block}"
    return rwkv4.tensors(layer, f"{layer}.attention", f"{layer}.feed_forward", NAMES.__getitem__)


FAMILY = Family(("rwkv",), blocks, options, outside, inside)
