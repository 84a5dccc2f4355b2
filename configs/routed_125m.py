"""Full attention, MoBA, NSA or InfLLM-v2 in twelve blocks, 124M parameters (NSA: 135M), for one accelerator.

    python -m experiments.routed_curves --full
    python -m experiments.train --config=configs/routed_125m.py:nsa --workdir=runs/nsa

Rows of 4096 tokens, of which a routed mixer reads about 1024, in blocks of 64: MoBA 16 blocks; NSA 8 blocks, a window
of 256 and up to 255 compressed tokens (its paper, for rows of 8k and more, has 16 and 512); InfLLM-v2 12 and 256.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.routed_small import routed

MIXERS: dict[str, dict[str, Any]] = {
    "attention": {},
    "moba": {"block_size": 64, "topk": 16},
    "nsa": {"topk": 8, "window": 256},
    "infllm2": {"topk": 12, "window": 256, "dense_len": 0},
}


def get_config(name: str = "moba") -> ConfigDict:
    config = routed(name, MIXERS, heads=12, kv_heads=3)
    config.model.dim = 768
    config.model.mlp_dim = 3840
    config.model.repeats = 12
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.data.batch_size = 4
    config.data.sequence_length = 4096
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 20
    config.train.steps = 120
    config.train.eval_every = 40
    config.train.checkpoint_every = 120
    config.eval.max_bytes = 131_072
    return config
