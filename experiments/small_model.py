"""Many small models of one architecture trained at once on a synthetic task, for experiments of minutes.

Models that differ in their seed and learning rate are one `vmap`, steps are one `lax.scan`, and batches are drawn on
the device inside it.
"""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from effattn_jax.layers import RMSNorm, ShortConvolution
from effattn_jax.models import Block
from effattn_jax.models.blueprint import Parameters, blueprint, parameters_of
from effattn_jax.typing import Array, Bool, Float, Logits, Tokens


class Batch(NamedTuple):
    """Rows of a task: what is read, what is to be said after each token, and which answers count."""

    tokens: Tokens
    targets: Tokens
    scored: Bool[Array, "B T"]


Sample = Callable[[Array], Batch]  # from a random key


class SmallModel(nnx.Module):
    """Blocks between an embedding and a head, each after the same short convolution where `conv_width` is not 0.

    The convolution lets every mechanism see the tokens next to each other, also those that have none of their own: what
    is compared is the memory.
    """

    def __init__(
        self,
        mixer: str,
        options: Mapping[str, Any],
        *,
        vocab_size: int,
        answers: int,
        dim: int,
        mlp_dim: int,
        layers: int,
        conv_width: int,
        rngs: nnx.Rngs,
    ):
        embedding = nnx.initializers.normal(1.0)(rngs.params(), (vocab_size, dim), jnp.float32)
        self.embedding = nnx.Param(embedding, axes=("vocab", "embed"))
        convolution = lambda: ShortConvolution(dim, conv_width, axis="embed", rngs=rngs)  # noqa: E731
        self.convolutions = nnx.List([convolution() for _ in range(layers)]) if conv_width else None
        self.blocks = nnx.List(
            Block(dim, mixer, options, mlp_dim=mlp_dim, layer_index=i, layer_count=layers, rngs=rngs)
            for i in range(layers)
        )
        self.norm = RMSNorm(dim)
        self.head = nnx.Param(
            nnx.initializers.lecun_normal()(rngs.params(), (dim, answers), jnp.float32), axes=("embed", "vocab")
        )

    def __call__(self, tokens: Tokens) -> Logits:
        x = jnp.take(self.embedding[...], tokens, axis=0)
        for i, block in enumerate(self.blocks):
            if self.convolutions is not None:
                x = x + self.convolutions[i](x)[0]
            x, _ = block(x)
        return self.norm(x) @ self.head[...]


class Fit(NamedTuple):
    """The best of the trained models: the one with the highest mean accuracy over the evaluations."""

    accuracy: dict[str, float]
    learning_rate: float
    seed: int
    steps: int
    seconds: float


def fit_all[Name](jobs: Mapping[Name, Callable[[], Fit]], workers: int) -> Iterator[tuple[Name, Fit]]:
    """The fits as they are done, `workers` of them at a time: programs compile side by side and share the device."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        names = {pool.submit(job): name for name, job in jobs.items()}
        for done in concurrent.futures.as_completed(names):
            yield names[done], done.result()


def fit(
    make: Callable[[nnx.Rngs], nnx.Module],
    sample: Sample,
    evaluations: Mapping[str, Batch],
    *,
    learning_rates: Sequence[float],
    seeds: int = 1,
    steps: int,
    warmup: int = 100,
    every: int = 200,
    weight_decay: float = 0.0,
    solved: float = 0.995,
) -> Fit:
    """Train every seed with every learning rate by AdamW on the batches of `sample`; stop when one has solved it all.

    Args:
      make: builds a model, `model(tokens) -> logits`.
      sample: draws the batch of a step; all models see the same ones.
      evaluations: name -> rows to measure accuracy on, every `every` steps. The task is solved when a model answers a
        fraction of `solved` in each.
      steps: at most so many, the learning rate falling to a tenth along a cosine after `warmup` steps.
    """
    began = time.perf_counter()
    plan = blueprint(lambda: make(nnx.Rngs(0)))
    rates = jnp.asarray([rate for rate in learning_rates for _ in range(seeds)])
    keys = jnp.tile(jax.random.split(jax.random.key(0), seeds), len(learning_rates))
    decayed = {name: name.endswith("kernel") for name in plan.names}
    schedule = optax.warmup_cosine_decay_schedule(0, 1, warmup, max(steps, warmup + 1), 0.1)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.98),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule),
    )

    @jax.jit
    @jax.vmap
    def start(key: Array) -> tuple[Parameters, Any]:
        parameters = parameters_of(make(nnx.Rngs(key)))
        return parameters, optimizer.init(parameters)

    def loss(parameters: Parameters, batch: Batch) -> Float[Array, ""]:
        losses = optax.softmax_cross_entropy_with_integer_labels(plan.model(parameters)(batch.tokens), batch.targets)
        return jnp.mean(losses, where=batch.scored)

    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def update(model: tuple[Parameters, Any], rate: Array, batch: Batch) -> tuple[tuple[Parameters, Any], Array]:
        parameters, moments = model
        value, gradient = jax.value_and_grad(loss)(parameters, batch)
        change, moments = optimizer.update(gradient, moments, parameters)
        return (optax.apply_updates(parameters, jax.tree.map(lambda x: rate * x, change)), moments), value

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(models: Any, keys: Array) -> tuple[Any, Array]:
        return jax.lax.scan(lambda models, key: update(models, rates, sample(key)), models, keys)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def accuracy(model: tuple[Parameters, Any], batch: Batch) -> Float[Array, ""]:
        right = jnp.argmax(plan.model(model[0])(batch.tokens), -1) == batch.targets
        return jnp.mean(right, where=batch.scored)

    models, done = start(keys), 0
    step_keys = jax.random.split(jax.random.key(1), steps)
    while True:
        table = {name: np.asarray(accuracy(models, batch)) for name, batch in evaluations.items()}
        scores = np.stack(list(table.values()))
        if done >= steps or (scores.min(0) >= solved).any():
            break
        models, _ = advance(models, step_keys[done : done + every])
        done = min(done + every, steps)
    best = int(np.nanargmax(np.where(scores.min(0) >= solved, 2, scores.mean(0))))
    return Fit(
        {name: float(values[best]) for name, values in table.items()},
        float(rates[best]),
        best % seeds,
        done,
        time.perf_counter() - began,
    )
