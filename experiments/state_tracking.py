"""Can a memory follow a state? Parity, and products of permutations of three things.

    python -m experiments.state_tracking [--full --workers=8] [--output=DIR]

A row of elements of a group is read; after each, the product of all so far is to be said. Parity is the group of two
elements, S3 that of the six permutations. One layer of each mechanism is trained on short rows and tested on longer
ones. What to expect (Grazzi et al. 2024, arXiv:2411.12537; Siems et al. 2025, arXiv:2502.10297): a memory whose
transitions have no negative eigenvalue cannot keep parity, the delta rule with beta in (0, 2) can; one reflection a
token is not enough for S3, a product of two is.

Without --full: small models and rows of 32 tokens, minutes on a CPU. Writes state_tracking.json and
state_tracking.png to --output.
"""

import functools
import itertools
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from effattn_jax.typing import Array
from experiments.report import plot_accuracy, write_report
from experiments.small_model import Batch, Fit, SmallModel, fit, fit_all

FLAGS = flags.FlagValues()
WORKERS = flags.DEFINE_integer("workers", 1, "models that are trained at the same time", flag_values=FLAGS)
FULL = flags.DEFINE_bool("full", False, "more seeds, steps and longer rows, for an accelerator", flag_values=FLAGS)
OUTPUT = flags.DEFINE_string(
    "output", "runs/state_tracking", "where state_tracking.json and state_tracking.png go", flag_values=FLAGS
)


def parity_table() -> np.ndarray:
    return np.array([[0, 1], [1, 0]])


def s3_table() -> np.ndarray:
    """table[a, b] is the permutation "first a, then b" of three things; 0 is the one that moves nothing."""
    permutations = list(itertools.permutations(range(3)))
    return np.array([[permutations.index(tuple(b[i] for i in a)) for b in permutations] for a in permutations])


def draw(key: Array, rows: int, length: int, table: np.ndarray) -> Batch:
    """Random elements of the group with that multiplication table, and after each the product of all so far."""
    elements = jax.random.randint(key, (rows, length), 0, len(table))
    products = jax.lax.associative_scan(lambda a, b: jnp.asarray(table)[a, b], elements, axis=1)
    return Batch(elements, products, jnp.ones_like(elements, bool))


DELTA = {"heads": 4, "head_dim": 8, "conv_width": 1}  # filters of one token: what is known of the past is in the memory
PRODUCT = DELTA | {"householders": 2, "expand_v": 1.0, "forget_gate": False, "output_gate": False}


class Task(NamedTuple):
    """A group by its multiplication table, and the models of one layer: a mixer and its options."""

    table: np.ndarray
    difficulty: int  # so many times the steps
    models: Mapping[str, tuple[str, Mapping[str, Any]]]


TASKS = {
    "parity": Task(
        parity_table(),
        1,
        {
            "DeltaNet, β < 1": ("delta_net", DELTA),
            "DeltaNet, β < 2": ("delta_net", DELTA | {"allow_negative_eigenvalues": True}),
        },
    ),
    "S3": Task(
        s3_table(),
        3,
        {
            "DeltaNet, β < 2": ("delta_net", DELTA | {"allow_negative_eigenvalues": True}),
            "DeltaProduct 2, β < 1": ("gated_delta_product", PRODUCT | {"allow_negative_eigenvalues": False}),
            "DeltaProduct 2, β < 2": ("gated_delta_product", PRODUCT),
        },
    ),
}


class Size(NamedTuple):
    dim: int
    length: int  # of rows of training
    lengths: tuple[int, ...]  # of rows to test on
    rows: int
    steps: int  # of a task of difficulty 1
    seeds: int
    learning_rates: tuple[float, ...]


SMALL = Size(32, 32, (16, 32, 64, 128), 32, 1000, 1, (3e-3, 1e-2))
LARGE = Size(64, 64, (32, 64, 128, 256, 512), 128, 2000, 4, (1e-3, 3e-3, 1e-2))


def train(task: Task, model: str, size: Size) -> Fit:
    """The fit of one model; its evaluations are named by the length of the rows."""
    (mixer, options), table = task.models[model], task.table
    make = functools.partial(
        SmallModel,
        mixer,
        options,
        vocab_size=len(table),
        answers=len(table),
        dim=size.dim,
        mlp_dim=2 * size.dim,
        layers=1,
        conv_width=0,
    )
    return fit(
        lambda rngs: make(rngs=rngs),
        lambda key: draw(key, size.rows, size.length, table),
        {str(length): draw(jax.random.key(1000 + length), 128, length, table) for length in size.lengths},
        learning_rates=size.learning_rates,
        seeds=size.seeds,
        steps=size.steps * task.difficulty,
        solved=0.999,
    )


def main() -> None:
    FLAGS(sys.argv)
    size = LARGE if FULL.value else SMALL
    jobs = {
        (name, model): functools.partial(train, task, model, size)
        for name, task in TASKS.items()
        for model in task.models
    }
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; trained on rows of {size.length}, accuracy on rows of"
    )
    print(f"{'':32}" + "".join(f"{length:>7}" for length in size.lengths) + "  steps     s")
    fits: dict[tuple[str, str], Fit] = {}
    for (name, model), best in fit_all(jobs, WORKERS.value):
        cells = "".join(f"{value:>7.3f}" for value in best.accuracy.values())
        print(f"{name + ': ' + model:32}{cells}{best.steps:>7}{best.seconds:>6.0f}", flush=True)
        fits[name, model] = best
    rows: list[dict[str, Any]] = []
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for name, model in jobs:
        mixer, options = TASKS[name].models[model]
        best = fits[name, model]
        rows.append({"task": name, "model": model, "mixer": mixer, "options": options, **best._asdict()})
        line = {int(length): value for length, value in best.accuracy.items()}
        panels.setdefault(name, {})[model] = line
    write_report(f"{OUTPUT.value}/state_tracking.json", "experiments.state_tracking", rows, size=size._asdict())
    chances = {name: 1 / len(task.table) for name, task in TASKS.items()}
    plot_accuracy(f"{OUTPUT.value}/state_tracking.png", panels, x="tokens", chance=chances, marked=size.length)
    print(f"written: state_tracking.json, state_tracking.png in {OUTPUT.value}")


if __name__ == "__main__":
    main()
