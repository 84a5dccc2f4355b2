"""A hybrid language model on the Python standard library's own source text, on a laptop's CPU.

Three Mamba-2 layers and one of sliding-window attention, trained on bytes.

    make quickstart
    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from configs.common import base


def get_config() -> ConfigDict:
    config = base()
    config.model.dim = 160
    config.model.mlp_dim = 448
    config.model.mixers = {
        "mamba2": {"head_dim": 40, "state_dim": 32},
        "local": {"kind": "attention", "heads": 4, "kv_heads": 2, "window": 128, "qk_norm": True},
    }
    config.data.batch_size = 4
    config.data.sequence_length = 512
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 30
    config.train.steps = 600
    config.train.eval_every = 150
    config.train.checkpoint_every = 150
    config.eval.max_bytes = 100_000
    return config
