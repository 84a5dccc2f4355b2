"""Full attention, MoBA, NSA or InfLLM-v2 in four small blocks, for a CPU: what does reading a quarter of the keys cost?

    python -m experiments.routed_curves
    python -m experiments.train --config=configs/routed_small.py:moba --workdir=runs/moba

Rows of 512 bytes of the Python library's source. A routed mixer reads about 128 keys, in blocks of 16.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.common import base
from effattn_jax import checks

WINDOWS = {"kernel_size": 16, "kernel_stride": 8, "block_size": 16}
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {},
    "moba": {"block_size": 16, "topk": 8},
    "nsa": WINDOWS | {"topk": 4, "local_blocks": 1, "window": 32},
    "infllm2": WINDOWS | {"topk": 6, "window": 32, "dense_len": 0},
}


def get_config(name: str = "moba") -> ConfigDict:
    config = routed(name, MIXERS, heads=4, kv_heads=2)
    config.model.dim = 128
    config.model.mlp_dim = 352
    config.model.repeats = 4
    config.data.batch_size = 4
    config.data.sequence_length = 512
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 30
    config.train.steps = 300
    config.train.eval_every = 75
    config.train.checkpoint_every = 300
    config.eval.max_bytes = 20_000
    return config


def routed(name: str, mixers: Mapping[str, Mapping[str, Any]], *, heads: int, kv_heads: int) -> ConfigDict:
    """Every block has the mixer of that name; all mixers have the same heads."""
    if name not in mixers:
        checks.fail("mechanism", repr(name), f"one of {', '.join(mixers)}")
    config = base()
    config.model.pattern = (name,)
    config.model.mixers = {name: {"heads": heads, "kv_heads": kv_heads, "qk_norm": True, **mixers[name]}}
    return config
