"""What RWKV-6 and RWKV-7 share as flash-linear-attention stores them: the time mix `attn`, the channel mix `ffn`, norms
with a bias, and one after the embedding, kept in the first block."""

from collections.abc import Sequence
from typing import Any

from effattn_jax.pretrained.entry import Entry, linear, norm, same
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.family import Config

COMMON = {**fla.COMMON, "hidden_act": "sqrelu", "norm_first": True, "norm_eps": 1e-5}
ONLY = {"hidden_act": "sqrelu", "norm_bias": True, "attnres_block_size": None}


def options(config: Config, kind: str, mixer: Config) -> dict[str, Any]:
    return {
        **fla.sizes(config),
        "mlp": f"{kind}_channel_mix",
        "mlp_dim": config["intermediate_size"] or 32 * -(-int(config["hidden_size"] * config["hidden_ratio"]) // 32),
        "norm": "layer",
        "embedding_norm": config["norm_first"],
        "mixers": {kind: mixer, **fla.softmax_mixers(config)},
    }


def outside(config: Config) -> Sequence[Entry]:
    return [
        *same("model.embeddings.weight", "embedding"),
        *(norm("model.layers.0.pre_norm", "embedding_norm", bias=True) if config["norm_first"] else []),
        *norm("model.norm", "final_norm", bias=True),
        *([] if config["tie_word_embeddings"] else linear("lm_head", "head")),
    ]


def norms(layer: str) -> list[Entry]:
    return [*norm(f"{layer}.attn_norm", "norm", bias=True), *norm(f"{layer}.ffn_norm", "mlp_norm", bias=True)]
