"""The smallest hybrid that shows everything a run does; the tests of whole runs start from it."""

from ml_collections import ConfigDict

from configs.common import base


def get_config() -> ConfigDict:
    config = base()
    config.model.dim, config.model.mlp_dim, config.model.repeats = 32, 64, 2
    config.model.pattern = ("mamba2", "local")
    config.model.mixers = {
        "mamba2": {"head_dim": 16, "state_dim": 8},
        "local": {"kind": "attention", "heads": 2, "kv_heads": 2, "window": 24},
    }
    config.data.batch_size, config.data.sequence_length = 8, 80
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-3, 2
    config.train.steps, config.train.eval_every, config.train.checkpoint_every = 8, 4, 4
    config.eval.max_bytes = 4000
    config.report.tokens = 12
    return config
