"""A dense model that reads far back: text of the Python library with needles in it, see experiments/sparse_quality.py.

    python -m experiments.sparse_quality           # `get_config()`: two CPU cores
    python -m experiments.sparse_quality --full    # `get_config("full")`: one accelerator

stages           (bytes of a row, rows of a step, needles, questions, steps): short rows full of needles teach the model
                 to find them, which long ones then only spread
answer_weight    of an answer in the loss, where a byte of text has 1
test.length      bytes that are read of a row, the last of them the question
test.decoded     so many of them, at the end, are decoded
test.needles     of a row
test.text_rows, .needle_rows, .batch  rows of held-out text, rows with needles, rows of a program
sweep.shares     budgets, as shares of the row's keys
sweep.block, .page  keys of a block at prefill, of a page at decoding
"""

from ml_collections import ConfigDict

from configs.common import base


def get_config(size: str = "small") -> ConfigDict:
    config = base()
    full = size == "full"
    config.model.dim, config.model.mlp_dim, config.model.repeats = (512, 1408, 8) if full else (128, 352, 4)
    config.model.pattern = ("attention",)
    heads, kv_heads = (8, 2) if full else (4, 2)
    # Three things without which so short a run does not learn to find needles. Channels that are not rotated compare
    # keys at any distance; a feed-forward layer that sees the token before, too, tells what follows a key; embeddings
    # of variance 1 show in the residual stream from the first step on. Attention is all that reads farther back.
    config.model.mixers = {"attention": {"heads": heads, "kv_heads": kv_heads, "qk_norm": True, "rope_fraction": 0.5}}
    config.model.mlp = "rwkv7_channel_mix"
    config.model.embedding_scale = 50.0
    config.optimizer.learning_rate = 1e-3 if full else 4e-3
    config.optimizer.final_fraction = 0.05
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.98
    config.answer_weight = 4.0
    if full:
        config.model.dtype = "bfloat16"
        config.stages = ((128, 64, 8, 8, 1500), (1024, 16, 16, 32, 1000), (4096, 8, 24, 48, 2000))
        config.test = {
            "length": 4096,
            "decoded": 64,
            "needles": 24,
            "text_rows": 64,
            "needle_rows": 512,
            "batch": 16,
        }
        config.sweep = {"shares": (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2), "block": 64, "page": 16}
    else:
        config.stages = ((80, 16, 6, 6, 2000), (256, 8, 10, 16, 600), (512, 8, 16, 16, 500))
        config.test = {
            "length": 512,
            "decoded": 32,
            "needles": 16,
            "text_rows": 64,
            "needle_rows": 128,
            "batch": 32,
        }
        config.sweep = {"shares": (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2), "block": 16, "page": 8}
    return config
