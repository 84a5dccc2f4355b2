"""Which model: one that was trained here, by its config and workdir, or a published checkpoint."""

import os

import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from effattn_jax import checks
from effattn_jax.models import LanguageModel
from effattn_jax.models.blueprint import blueprint
from effattn_jax.pretrained import load, load_tokenizer
from effattn_jax.pretrained.hub import PTH, directory_of, file_of
from effattn_jax.pretrained.tokenizer import PretrainedTokenizer, has_tokenizer
from effattn_jax.training.data import Tokenizer
from effattn_jax.training.data import load_tokenizer as load_training_tokenizer
from effattn_jax.training.restore import restore_params
from effattn_jax.training.setup import model_maker

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

FLAGS = flags.FlagValues()
CHECKPOINTS = flags.DEFINE_multi_string(
    "checkpoint",
    [],
    "a directory in Hugging Face's format, author/name of its hub, or an RWKV file x.pth",
    flag_values=FLAGS,
)
DTYPE = flags.DEFINE_enum(
    "dtype", None, list(DTYPES), "of a --checkpoint's matrices; default: as in its files", flag_values=FLAGS
)
STEP = flags.DEFINE_integer("step", None, "which checkpoint of the workdir; default: the newest", flag_values=FLAGS)


def trained(config: ConfigDict, workdir: str) -> tuple[LanguageModel, Tokenizer, int]:
    """The model that a run left in its workdir, its tokenizer, and the step.

    Raises:
      ValueError: there is a --checkpoint too.
    """
    if CHECKPOINTS.value:
        checks.fail("--checkpoint", "one beside --config", "one of the two")
    tokenizer = load_training_tokenizer(config.data.tokenizer)
    plan = blueprint(model_maker(config, tokenizer.vocab_size))
    step, parameters = restore_params(os.path.join(workdir, "checkpoints"), plan.shapes, step=STEP.value)
    return plan.model(parameters), tokenizer, step


def published() -> tuple[LanguageModel, PretrainedTokenizer | None]:
    """The model of --checkpoint, and its tokenizer where it has one.

    Raises:
      ValueError: no --checkpoint; what `effattn_jax.pretrained.load` refuses.
    """
    if not CHECKPOINTS.value:
        checks.fail("flags", "neither --config nor --checkpoint", "one of the two (--help shows all flags)")
    if len(CHECKPOINTS.value) > 1:
        checks.fail("--checkpoint", f"{len(CHECKPOINTS.value)} of them", "one")
    (name,) = CHECKPOINTS.value
    dtype = None if DTYPE.value is None else DTYPES[DTYPE.value]
    directory = file_of(name).parent if name.endswith(PTH) else directory_of(name)
    tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
    return load(name if name.endswith(PTH) else directory, dtype=dtype), tokenizer
