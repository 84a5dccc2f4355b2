"""One step of training, in two forms with the same losses: by the partitioner, or with the collective written out."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from effattn_jax import checks
from effattn_jax.models.activations import BATCH_AXES
from effattn_jax.models.blueprint import Blueprint, Parameters
from effattn_jax.models.language_model import LanguageModel
from effattn_jax.models.loss import token_losses
from effattn_jax.models.shardings import parameter_shardings
from effattn_jax.training.sharding import replicated, shardings_like
from effattn_jax.typing import Array, Scalar

Batch = dict[str, Array]
FORMS = ("jit", "shard_map")


class TrainState(NamedTuple):
    """All that a step changes; or, in the same places, shapes or shardings of it."""

    step: Any  # int32, steps done
    parameters: Any  # Parameters, float32
    optimizer: Any


class Sums(NamedTuple):
    """What adds up over microbatches and devices."""

    gradients: Parameters
    nats: Scalar
    tokens: Scalar


def state_shardings(blueprint: Blueprint[Any], optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    parameters = parameter_shardings(blueprint, mesh)
    moments = jax.eval_shape(optimizer.init, blueprint.shapes)
    return TrainState(replicated(mesh), parameters, shardings_like(moments, parameters, mesh))


MATRICES = {"kernel", "embedding", "mix_up"}  # names of parameters that multiply channels


def decay_mask(blueprint: Blueprint[Any]) -> dict[str, bool]:
    """Weight decay pulls on embeddings and on matrices of channels, of experts and blocks too.

    Not on norms, biases, rates such as Mamba's A_log, starts of memories, taps of convolutions and constants.
    """
    return {name: name.split(".")[-1] in MATRICES and "conv" not in axes for name, axes in blueprint.axes.items()}


def loss_sum(blueprint: Blueprint[LanguageModel], parameters: Parameters, batch: Batch) -> tuple[Scalar, Scalar]:
    """Cross entropy in nats summed over the tokens that are no padding, and their number."""
    model = blueprint.model(parameters)
    real = batch["segment_ids"] >= 0
    hidden, _ = model.hidden(batch["inputs"], segment_ids=batch["segment_ids"], positions=batch["positions"])
    losses = token_losses(hidden, model.head_weights(), batch["targets"], soft_cap=model.logits_soft_cap)
    return jnp.sum(jnp.where(real, losses, 0)), jnp.sum(real, dtype=jnp.float32)


def gradient_sums(blueprint: Blueprint[LanguageModel], parameters: Parameters, batch: Batch, microbatches: int) -> Sums:
    """Gradients of the summed loss, over microbatches one after the other."""

    def sums(batch: Batch) -> Sums:
        value = functools.partial(loss_sum, blueprint, batch=batch)
        (nats, tokens), gradients = jax.value_and_grad(value, has_aux=True)(parameters)
        return Sums(gradients, nats, tokens)

    if microbatches == 1:
        return sums(batch)
    # Every microbatches-th row: rows stay on the device they are on.
    parts = {name: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0) for name, x in batch.items()}
    zero = jnp.zeros_like(batch["inputs"], shape=(), dtype=jnp.float32)
    start = Sums(jax.tree.map(jnp.zeros_like, parameters), zero, zero)
    total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, sums(part)), None), start, parts)
    return total


def make_train_step(
    blueprint: Blueprint[LanguageModel],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    microbatches: int = 1,
    form: str = "jit",
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Scalar]]]:
    """A jitted step; the state given to it is donated.

    form "jit": one program over the mesh, the partitioner places the collectives. "shard_map": every device computes on
    its own rows and sums gradients with an explicit `psum`; parameters are whole on every device.
    """
    if form not in FORMS:
        checks.fail("train.step", repr(form), f"one of {', '.join(FORMS)}")
    sums: Callable[[Parameters, Batch], Sums] = functools.partial(gradient_sums, blueprint, microbatches=microbatches)
    if form == "shard_map":
        sums = _data_parallel(sums, mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Scalar]]:
        gradients, nats, tokens = sums(state.parameters, batch)
        gradients = jax.tree.map(lambda g: g / tokens, gradients)
        updates, moments = optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        metrics = {
            "loss": nats / tokens,
            "gradient_norm": optax.global_norm(gradients),
            "parameter_norm": optax.global_norm(parameters),
        }
        return TrainState(state.step + 1, parameters, moments), metrics

    shardings = state_shardings(blueprint, optimizer, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def _data_parallel(sums: Callable[[Parameters, Batch], Sums], mesh: Mesh) -> Callable[[Parameters, Batch], Sums]:
    for axis in ("fsdp", "tensor"):
        if mesh.shape[axis] != 1:
            checks.fail(f"mesh.{axis}", mesh.shape[axis], 'size 1 with step "shard_map": parameters are not cut there')

    def local(parameters: Parameters, batch: Batch) -> Sums:
        # Marked as varying, the parameters get the gradient of this device's rows alone; the sum is ours to write.
        parameters = jax.tree.map(lambda x: jax.lax.pcast(x, BATCH_AXES, to="varying"), parameters)
        return jax.lax.psum(sums(parameters, batch), BATCH_AXES)

    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=PartitionSpec())
