"""Teaching one language model what another one says: block by block, then at its logits."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from effattn_jax.models import LanguageModel
from effattn_jax.models.blueprint import Blueprint, Parameters
from effattn_jax.models.conversion import blocks_of
from effattn_jax.training.data import Tokenizer
from effattn_jax.training.optimizer import make_optimizer
from effattn_jax.training.setup import train_stream
from effattn_jax.typing import Array, Scalar

Batch = Mapping[str, Array]
Loss = Callable[[LanguageModel, LanguageModel, Batch], Scalar]


def where_of(batch: Batch) -> dict[str, Any]:
    return {"segment_ids": batch["segment_ids"], "positions": batch["positions"]}


def transfer_loss(teacher: LanguageModel, student: LanguageModel, batch: Batch, *, replaced: Sequence[int]) -> Scalar:
    """Mean over the blocks `replaced` of |mixer(x) - attention(x)|^2 / |attention(x)|^2, x what the teacher's saw."""
    x, total, real = teacher.embed(batch["inputs"]), jnp.zeros(()), batch["segment_ids"][..., None] >= 0
    squares = lambda y: jnp.sum(jnp.where(real, jnp.square(y.astype(jnp.float32)), 0))  # noqa: E731
    for i, (old, new) in enumerate(zip(blocks_of(teacher), blocks_of(student), strict=True)):
        if i in replaced:
            normed = old.norm(x)
            want, got = old.mixer(normed, **where_of(batch))[0], new.mixer(normed, **where_of(batch))[0]
            total += squares(got - want) / (squares(want) + 1e-8)
        x, _ = old(x, **where_of(batch))
    return total / len(replaced)


def distillation_loss(teacher: LanguageModel, student: LanguageModel, batch: Batch) -> Scalar:
    """Mean over tokens of KL(teacher || student) in nats."""
    scores = lambda model: jax.nn.log_softmax(model(batch["inputs"], **where_of(batch))[0])  # noqa: E731
    want, got = scores(teacher), scores(student)
    each = jnp.sum(jnp.exp(want) * (want - got), axis=-1)
    real = batch["segment_ids"] >= 0
    return jnp.sum(jnp.where(real, each, 0)) / jnp.maximum(jnp.sum(real), 1)


def fitted(
    config: ConfigDict,
    tokenizer: Tokenizer,
    teacher: tuple[Blueprint[LanguageModel], Parameters],
    student: tuple[Blueprint[LanguageModel], Parameters],
    loss: Loss,
    steps: int,
    title: str,
) -> Parameters:
    """The student's parameters after so many steps on the config's text with its optimiser, without weight decay."""
    if not steps:
        return student[1]
    plan, options = student[0], ConfigDict(config.optimizer.to_dict())
    options.weight_decay, options.warmup_steps = 0.0, min(options.warmup_steps, steps // 5)
    optimizer = make_optimizer(options, steps)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(fixed: Parameters, parameters: Parameters, state: Any, batch: Batch) -> tuple[Parameters, Any, Scalar]:
        of = lambda parameters: loss(teacher[0].model(fixed), plan.model(parameters), batch)  # noqa: E731
        value, gradient = jax.value_and_grad(of)(parameters)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    parameters = jax.tree.map(jnp.copy, student[1])
    state, stream, began = optimizer.init(parameters), train_stream(config, tokenizer), time.perf_counter()
    for i in range(1, steps + 1):
        batch = {name: jnp.asarray(x) for name, x in next(stream).items()}
        parameters, state, value = step(teacher[1], parameters, state, batch)
        if i == 1 or i % max(1, steps // 5) == 0:
            print(f"{title} {i:>5} of {steps}: loss {value:.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    return parameters
