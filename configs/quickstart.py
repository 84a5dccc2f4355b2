"""A hybrid language model on the Python standard library's own source text, on a laptop's CPU.

Three Mamba-2 layers and one of sliding-window attention, trained on bytes.

    make quickstart
    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from configs.common import base


def get_config() -> ConfigDict:
    config = base()
    config.model.dim = 192
    config.model.mlp_dim = 512
    config.model.mixers = {
        "mamba2": {"head_dim": 48, "state_dim": 48},
        "local": {"kind": "attention", "heads": 4, "kv_heads": 2, "window": 128, "qk_norm": True},
    }
    config.data.batch_size = 8
    config.data.sequence_length = 512
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 30
    config.train.steps = 600
    config.train.eval_every = 100
    config.train.checkpoint_every = 100
    config.eval.max_bytes = 200_000
    return config
