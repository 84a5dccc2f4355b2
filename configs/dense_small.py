"""A small transformer, the teacher of `experiments.convert`: four blocks of softmax attention on bytes.

    python -m experiments.train --config=configs/dense_small.py --workdir=runs/dense_small

Two cores of a laptop take about ten minutes; held-out bits per byte come to about 2.
"""

from ml_collections import ConfigDict

from configs.common import base


def get_config() -> ConfigDict:
    config = base()
    config.model.dim = 128
    config.model.mlp_dim = 352
    config.model.pattern = ("attention",)
    config.model.repeats = 4
    config.model.mixers = {"attention": {"heads": 4, "kv_heads": 2}}
    config.data.batch_size = 4
    config.data.sequence_length = 256
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 30
    config.train.steps = 600
    config.train.eval_every = 200
    config.train.checkpoint_every = 200
    config.eval.max_bytes = 60_000
    return config
