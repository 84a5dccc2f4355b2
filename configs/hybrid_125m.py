"""A 125M hybrid for one accelerator: 12 Mamba-2 layers and 4 of attention over a window of 1024 tokens.

    python -m experiments.train --config=configs/hybrid_125m.py --workdir=runs/hybrid_125m

Any TFDS text dataset and tokenizer serve; the defaults, bytes of the Python library, need no download:
    --config.data.name=lm1b --config.data.tokenizer=<tokenizer.json>
"""

from ml_collections import ConfigDict

from configs.common import base


def get_config() -> ConfigDict:
    return hybrid(dim=768, mlp_dim=2048, repeats=4, heads=12, kv_heads=4, batch_size=16, learning_rate=1e-3)


def hybrid(
    *, dim: int, mlp_dim: int, repeats: int, heads: int, kv_heads: int, batch_size: int, learning_rate: float
) -> ConfigDict:
    """What the accelerator configs have in common: 3 Mamba-2 blocks to 1 of windowed attention, in bfloat16."""
    config = base()
    config.model.dim, config.model.mlp_dim, config.model.repeats = dim, mlp_dim, repeats
    config.model.pattern = ("mamba2", "mamba2", "local", "mamba2")
    config.model.mixers = {
        "mamba2": {"head_dim": 64, "state_dim": 128},
        "local": {
            "kind": "attention",
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": 64,
            "window": 1024,
            "qk_norm": True,
        },
    }
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.data.batch_size = batch_size
    config.data.sequence_length = 4096
    config.optimizer.learning_rate = learning_rate
    config.optimizer.warmup_steps = 200
    config.optimizer.schedule = "wsd"
    config.train.steps = 5000
    config.train.log_every = 10
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    config.train.tensorboard = True
    config.eval.max_bytes = 1_000_000
    return config
