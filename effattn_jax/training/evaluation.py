"""Held-out loss: bits per byte, and how it falls with the position in a document."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from effattn_jax.models.blueprint import Blueprint, Parameters
from effattn_jax.models.language_model import LanguageModel
from effattn_jax.models.loss import token_losses
from effattn_jax.models.shardings import parameter_shardings
from effattn_jax.training.sharding import global_batch, replicated
from effattn_jax.training.step import Batch
from effattn_jax.typing import Array, Float


class Evaluation(NamedTuple):
    nats: float  # summed over all tokens, ends of documents included
    tokens: int
    bytes: int
    nats_by_position: Float[np.ndarray, " T"]  # summed over the tokens at each position of their document
    tokens_by_position: Float[np.ndarray, " T"]

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    def loss_by_position(self, buckets: int) -> list[tuple[int, int, float]]:
        """(first, last, nats per token) over ranges of positions, each twice as long as the one before."""
        length = len(self.nats_by_position)
        edges = [0] + [length >> shift for shift in range(buckets - 1, -1, -1)]
        ranges = []
        for first, end in itertools.pairwise(edges):
            tokens = self.tokens_by_position[first:end].sum()
            if tokens:
                ranges.append((first, end - 1, float(self.nats_by_position[first:end].sum() / tokens)))
        return ranges


EvaluationStep = Callable[[Parameters, Batch], tuple[Array, Array]]


def make_evaluation_step(blueprint: Blueprint[LanguageModel], mesh: Mesh) -> EvaluationStep:
    """Jitted: nats and number of tokens at each position, summed over a batch on all devices."""

    @functools.partial(
        jax.jit,
        in_shardings=(parameter_shardings(blueprint, mesh), None),
        out_shardings=(replicated(mesh), replicated(mesh)),
    )
    def step(parameters: Parameters, batch: Batch) -> tuple[Array, Array]:
        model = blueprint.model(parameters)
        hidden, _ = model.hidden(batch["inputs"], segment_ids=batch["segment_ids"], positions=batch["positions"])
        real = batch["segment_ids"] >= 0
        losses = jnp.where(
            real, token_losses(hidden, model.head_weights(), batch["targets"], soft_cap=model.logits_soft_cap), 0
        )
        zeros = jnp.zeros(batch["inputs"].shape[1], jnp.float32)
        positions = batch["positions"]
        return zeros.at[positions].add(losses), zeros.at[positions].add(real.astype(jnp.float32))

    return step


def evaluate(
    step: EvaluationStep, parameters: Parameters, batches: Iterable[Mapping[str, Any]], total_bytes: int, mesh: Mesh
) -> Evaluation:
    """Sum the steps over batches that hold `total_bytes` bytes of text, each byte a target once."""
    nats: Any = 0.0
    tokens: Any = 0.0
    with jax.set_mesh(mesh):
        for batch in batches:
            more_nats, more_tokens = step(parameters, global_batch(batch, mesh))
            nats += np.asarray(more_nats, np.float64)
            tokens += np.asarray(more_tokens, np.float64)
    return Evaluation(float(nats.sum()), int(tokens.sum()), total_bytes, nats, tokens)
