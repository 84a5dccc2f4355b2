"""From a config to the objects of a run. All that can be wrong with a config is found here, before training starts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from effattn_jax import checks
from effattn_jax.models.blueprint import Blueprint, blueprint, parameters_of
from effattn_jax.models.language_model import LanguageModel
from effattn_jax.training.data import EvaluationBatches, Tokenizer, TrainStream, evaluation_batches, open_source
from effattn_jax.training.data import load_tokenizer as load
from effattn_jax.training.optimizer import make_optimizer
from effattn_jax.training.preflight import check_batch
from effattn_jax.training.sharding import batch_sharding, batch_shards, make_mesh
from effattn_jax.training.step import TrainState, decay_mask, make_train_step, state_shardings

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Setup(NamedTuple):
    """What a config stands for."""

    tokenizer: Tokenizer
    blueprint: Blueprint[LanguageModel]
    mesh: Mesh
    optimizer: optax.GradientTransformation
    make_state: Callable[[], TrainState]
    train_step: Any  # a jitted function, see make_train_step
    shardings: TrainState


def make_setup(config: ConfigDict) -> Setup:
    """Raises ValueError, one line, for what does not fit together."""
    mesh = make_mesh(config.mesh)
    check_batch(config.data.batch_size, batch_shards(mesh), config.train.microbatches, jax.process_count())
    _check_rows_per_process(mesh, config.data.batch_size)
    tokenizer = load(config.data.tokenizer)
    make_model = model_maker(config, tokenizer.vocab_size)
    plan = blueprint(make_model)
    optimizer = make_optimizer(config.optimizer, config.train.steps, decay_mask(plan))
    shardings = state_shardings(plan, optimizer, mesh)

    @jax.jit(out_shardings=shardings)
    def make_state() -> TrainState:
        parameters = parameters_of(make_model())
        return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters))

    step = make_train_step(plan, optimizer, mesh, microbatches=config.train.microbatches, form=config.train.step)
    return Setup(tokenizer, plan, mesh, optimizer, make_state, step, shardings)


def model_maker(config: ConfigDict, tokens: int) -> Callable[[], LanguageModel]:
    """A function that builds the model of `config.model`, for a tokenizer of that many tokens."""
    options = config.model.to_dict()
    dtype, vocab_size = options.pop("dtype"), options.pop("vocab_size")
    if dtype not in DTYPES:
        checks.fail("model.dtype", repr(dtype), f"one of {', '.join(DTYPES)}")
    if vocab_size is not None and vocab_size < tokens:
        checks.fail("model.vocab_size", vocab_size, f"at least {tokens}, the size of the tokenizer's vocabulary")
    return lambda: LanguageModel(
        **options, vocab_size=vocab_size or tokens, dtype=DTYPES[dtype], rngs=nnx.Rngs(config.seed)
    )


def train_stream(config: ConfigDict, tokenizer: Tokenizer) -> TrainStream:
    """This process's part of the training batches."""
    source = open_source(config.data.name, "train", config.data.directory, text_key=config.data.text_key)
    return TrainStream(
        source,
        tokenizer,
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def heldout_batches(config: ConfigDict, tokenizer: Tokenizer, sequence_length: int | None = None) -> EvaluationBatches:
    """The held-out documents in rows of `sequence_length` (None: that of training), with the same tokens in a batch."""
    length = sequence_length or config.data.sequence_length
    rows = max(jax.device_count(), config.data.batch_size * config.data.sequence_length // length)
    return evaluation_batches(
        open_source(config.data.name, "validation", config.data.directory, text_key=config.data.text_key),
        tokenizer,
        -(-rows // jax.device_count()) * jax.device_count(),
        length,
        config.eval.max_bytes,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _check_rows_per_process(mesh: Mesh, batch_size: int) -> None:
    """Each process makes batch_size / processes rows: its devices must hold just as many."""
    indices: Any = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    ranges = {index[0].indices(batch_size)[:2] for index in indices.values()}
    rows = sum(end - first for first, end in ranges)
    if rows * jax.process_count() != batch_size:
        checks.fail(
            "mesh", dict(mesh.shape), "a tensor axis inside one process: each process reads its own rows of the batch"
        )
