"""The dense model of `sparse_quality`: bytes of text with needles, on rows that grow."""

import functools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from effattn_jax.models import LanguageModel
from effattn_jax.models.blueprint import Blueprint, Parameters, blueprint, parameters_of
from effattn_jax.models.loss import token_losses
from effattn_jax.training.checkpoint import Checkpoints
from effattn_jax.training.data import ByteTokenizer, open_source
from effattn_jax.training.optimizer import make_optimizer
from effattn_jax.training.setup import model_maker
from effattn_jax.training.step import decay_mask
from effattn_jax.typing import Array
from experiments.sparse_needles import Rows, Task, draw_rows, text_of


class Trained(NamedTuple):
    blueprint: Blueprint[LanguageModel]
    parameters: Parameters
    steps: int
    seconds: float | None  # None: read from a checkpoint

    @property
    def model(self) -> LanguageModel:
        return self.blueprint.model(self.parameters)


def text(config: ConfigDict, split: str) -> np.ndarray:
    return text_of(open_source(config.data.name, split, config.data.directory, text_key=config.data.text_key))


def trained(config: ConfigDict, workdir: str, report: Callable[[str], None] = print) -> Trained:
    """Trains through `config.stages` and keeps the parameters in <workdir>/checkpoints; reads them where they are."""
    make = model_maker(config, ByteTokenizer.vocab_size)
    plan = blueprint(make)
    steps = sum(stage[-1] for stage in config.stages)
    with Checkpoints(os.path.join(workdir, "checkpoints"), keep=1, report=report) as checkpoints:
        if checkpoints.latest_step() == steps:
            found = checkpoints.restore_latest({"params": plan.shapes})
            assert found is not None, "there is a step"
            return Trained(plan, found[1]["params"], steps, None)
        began = time.perf_counter()
        parameters = fitted(config, plan, jax.jit(lambda: parameters_of(make()))(), report)
        checkpoints.save(steps, {"params": parameters}, wait=True)
    return Trained(plan, parameters, steps, time.perf_counter() - began)


def fitted(
    config: ConfigDict, plan: Blueprint[LanguageModel], parameters: Parameters, report: Callable[[str], None]
) -> Parameters:
    """AdamW on bytes that something foretells: keys and the values of needles have no loss."""
    steps = sum(stage[-1] for stage in config.stages)
    optimizer = make_optimizer(config.optimizer, steps, decay_mask(plan))
    weight, random, source = config.answer_weight, np.random.default_rng(config.seed), text(config, "train")

    def loss(parameters: Parameters, rows: Rows) -> tuple[Array, Array]:
        model, tokens = plan.model(parameters), jnp.asarray(rows.bytes)
        hidden, _ = model.hidden(tokens[:, :-1])
        losses = token_losses(hidden, model.head_weights(), tokens[:, 1:])
        answer = rows.answer[:, 1:]
        weights = jnp.where(rows.random[:, 1:], 0, jnp.where(answer, weight, 1))
        return jnp.sum(weights * losses) / jnp.sum(weights), jnp.mean(losses, where=answer)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Parameters, moments: Any, rows: Rows) -> tuple[Parameters, Any, tuple[Array, Array]]:
        values, gradients = jax.value_and_grad(loss, has_aux=True)(parameters, rows)
        updates, moments = optimizer.update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), moments, values

    moments, done, began = optimizer.init(parameters), 0, time.perf_counter()
    for length, count, needles, questions, these in config.stages:
        task = Task(length + 1, needles, questions)
        for _ in range(these):
            parameters, moments, values = step(parameters, moments, draw_rows(random, source, count, task))
            done += 1
            if done % 50 == 0 or done == steps:
                all_bytes, answers = map(float, values)
                seconds = time.perf_counter() - began
                line = f"step {done:>5} of {steps}, rows of {length:>4}: loss {all_bytes:.3f}, of answers {answers:.3f}"
                report(f"{line} nats, {seconds:.0f} s")
    return parameters
