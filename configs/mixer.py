"""Any mixer, alone, at the size of the quickstart: how do two mechanisms compare on the same text?

    python -m experiments.train --config=configs/mixer.py:gated_delta_net --workdir=runs/gated_delta_net
    python -m experiments.train --config=configs/mixer.py:rwkv7 --workdir=runs/rwkv7

Four blocks of the named mixer on bytes of the Python library's source. Where a mixer has heads there are about four.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.quickstart import get_config as quickstart

DIM, HEADS = 160, 4
HEAD_DIM = DIM // HEADS
DELTA = {"heads": HEADS, "head_dim": HEAD_DIM}
MAMBA = {"head_dim": HEAD_DIM, "state_dim": 32}
WINDOWS = {"kernel_size": 16, "kernel_stride": 8, "block_size": 32}
OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {"heads": HEADS},
    "comba": DELTA | {"expand_v": 1.0},
    "delta_net": DELTA,
    "dsa": {"heads": HEADS, "index_heads": HEADS, "index_dim": 32, "topk": 128},
    "fast_weight": {"heads": HEADS},
    "fox": {"heads": HEADS},
    "gated_delta_net": DELTA | {"expand_v": 1.0},
    "gated_delta_net2": DELTA,
    "gated_delta_product": DELTA | {"expand_v": 1.0},
    "gsa": {"heads": HEADS, "slots": 32},
    "hgrn2": {"head_dim": HEAD_DIM},
    "infllm2": {"heads": HEADS, "kv_heads": 2} | WINDOWS | {"topk": 4, "window": 64, "dense_len": 0},
    "kda": DELTA,
    "lightning": {"heads": HEADS},
    "linear_attention": {"heads": HEADS},
    "log_linear": MAMBA,
    "mamba2": MAMBA,
    "mamba3": MAMBA,
    "mesa_net": DELTA,
    "mla": {"heads": HEADS, "latent_dim": 64, "key_dim": 32, "rope_dim": 16, "value_dim": HEAD_DIM},
    "moba": {"heads": HEADS, "block_size": 64, "topk": 3},
    "nsa": {"heads": HEADS, "kv_heads": 2} | WINDOWS | {"topk": 4, "window": 64},
    "nsa_shared": {"heads": HEADS, "kv_heads": 2, "block_size": 32, "topk": 4, "window": 64},
    "path": {"heads": HEADS},
    "performer": {"heads": HEADS},
    "retention": {"heads": HEADS},
    "rg_lru": {"heads": HEADS},
    "rwkv5": {"head_dim": HEAD_DIM},
    "rwkv6": {"head_dim": HEAD_DIM},
    "rwkv7": {"head_dim": HEAD_DIM},
    "titans": {"expand": 1},
    "titans_mac": {"expand": 1},
    "titans_mag": {"expand": 1},
    "titans_mal": {"expand": 1},
    "ttt_linear": {"head_dim": HEAD_DIM},
    "ttt_mlp": {"head_dim": HEAD_DIM, "expand": 1},
}
"""Of mixers whose defaults are made for larger models."""


def get_config(name: str = "mamba2") -> ConfigDict:
    config = quickstart()
    config.model.pattern = (name,)
    config.model.repeats = 4
    config.model.mixers = {name: OPTIONS.get(name, {})}
    if name in ("rwkv4", "rwkv5", "rwkv6", "rwkv7"):
        config.model.mlp = {"rwkv4": "rwkv5"}.get(name, name) + "_channel_mix"
    return config
