"""Every field of a run, with its default. A config file starts from `base()` and sets what its experiment is about."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from effattn_jax.training.optimizer import default_config as optimizer_defaults


def base() -> ConfigDict:
    """
    seed                     of parameters and of the order of documents

    model.pattern            names of mixers, one a block; the pattern repeats model.repeats times
    model.mixers.<name>      options of a mixer; `kind` names it where <name> does not, `mlp_dim` is its block's
    model.before, .after     names of mixers of blocks before and after the pattern, once each
    model.dim, .mlp_dim      residual stream; hidden size of the feed-forward layers (0: none)
    model.mlp                their kind: "swiglu" or a channel mix of RWKV
    model.vocab_size         rows of the embedding; None: the tokenizer's
    model.dtype              of computation, "float32" or "bfloat16"; parameters are float32
    model.remat              recompute blocks in the backward pass
    model.tie_embeddings     the head is the transposed embedding

    data.name                "python_stdlib", "folder:<path>" or the name of a TFDS text dataset
    data.directory           of prepared TFDS datasets; None: TFDS's own
    data.text_key            the feature that holds the text, in TFDS datasets
    data.tokenizer           "bytes" or the path of a tokenizer.json
    data.batch_size          rows of the global batch
    data.sequence_length     tokens in a row

    optimizer.*              see effattn_jax/training/optimizer.py

    train.steps              length of the run
    train.microbatches       gradients are accumulated over so many parts of a batch
    train.step               "jit" or "shard_map" (data parallel, with the collective written out)
    train.log_every          steps between lines of metrics.jsonl
    train.eval_every         steps between evaluations on held-out text
    train.checkpoint_every   steps between checkpoints; the newest train.keep_checkpoints stay
    train.tensorboard        also write TensorBoard events
    train.profile_start      first step of a jax.profiler trace of train.profile_steps steps (0: none)

    eval.max_bytes           held-out bytes that are read; None: all

    mesh.data, .fsdp, .tensor  sizes of the device mesh; -1: what the others leave

    report.baselines         byte bigram and lzma on the held-out bytes, at the end of a run
    report.prompt, .tokens   a sampled continuation at the end of a run; 0 tokens: none
    report.temperature, .top_p  of that sample
    """
    return ConfigDict(
        {
            "seed": 0,
            "model": {
                "dim": 256,
                "mlp_dim": 704,
                "mlp": "swiglu",
                "pattern": ("mamba2", "mamba2", "mamba2", "local"),
                "repeats": 1,
                "before": (),
                "after": (),
                "mixers": {"mamba2": {}, "local": {"kind": "attention", "heads": 4, "window": 128}},
                "vocab_size": placeholder(int),
                "tie_embeddings": True,
                "norm_eps": 1e-6,
                "remat": False,
                "dtype": "float32",
            },
            "data": {
                "name": "python_stdlib",
                "directory": placeholder(str),
                "text_key": placeholder(str),
                "tokenizer": "bytes",
                "batch_size": 8,
                "sequence_length": 512,
            },
            "optimizer": optimizer_defaults().to_dict(),
            "train": {
                "steps": 1000,
                "microbatches": 1,
                "step": "jit",
                "log_every": 1,
                "eval_every": 100,
                "checkpoint_every": 100,
                "keep_checkpoints": 2,
                "tensorboard": False,
                "profile_start": 10,
                "profile_steps": 0,
            },
            "eval": {"max_bytes": placeholder(int)},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "report": {
                "baselines": True,
                "prompt": "def ",
                "tokens": 256,
                "temperature": 0.8,
                "top_p": 0.95,
            },
        }
    )
