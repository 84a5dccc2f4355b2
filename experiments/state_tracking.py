"""Can a memory follow a state? Parity, and products of permutations of three things.

    python -m experiments.state_tracking [--full] [--output=DIR]

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
from experiments.small_model import Batch, Fit, SmallModel, fit

FLAGS = flags.FlagValues()
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


DELTA = {"heads": 2, "head_dim": 16, "conv_width": 1}
PRODUCT = DELTA | {"householders": 2, "expand_v": 1.0, "forget_gate": False, "output_gate": False}
TASKS: dict[str, tuple[np.ndarray, dict[str, tuple[str, dict[str, Any]]]]] = {
    "parity": (
        parity_table(),
        {
            "DeltaNet, β < 1": ("delta_net", DELTA),
            "DeltaNet, β < 2": ("delta_net", DELTA | {"allow_negative_eigenvalues": True}),
        },
    ),
    "S3": (
        s3_table(),
        {
            "DeltaNet, β < 2": ("delta_net", DELTA | {"allow_negative_eigenvalues": True}),
            "DeltaProduct 2, β < 1": ("gated_delta_product", PRODUCT | {"allow_negative_eigenvalues": False}),
            "DeltaProduct 2, β < 2": ("gated_delta_product", PRODUCT),
        },
    ),
}
"""Task -> multiplication table, and models of one layer: mixer and options. The filters see one token, so that what a
model knows of the past is in its memory."""


class Size(NamedTuple):
    dim: int
    length: int  # of rows of training
    lengths: tuple[int, ...]  # of rows to test on
    rows: int
    steps: int
    seeds: int
    learning_rates: tuple[float, ...]


SMALL = Size(32, 32, (16, 32, 64, 128), 64, 2000, 2, (3e-3, 1e-2))
LARGE = Size(64, 64, (32, 64, 128, 256, 512), 256, 5000, 5, (1e-3, 3e-3, 1e-2))


def train(table: np.ndarray, mixer: str, options: Mapping[str, Any], size: Size) -> Fit:
    """The fit of one model; its evaluations are named by the length of the rows."""
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
        steps=size.steps,
        solved=0.999,
    )


def main() -> None:
    FLAGS(sys.argv)
    size = LARGE if FULL.value else SMALL
    rows, panels = [], {}
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; trained on rows of {size.length}, accuracy on rows of"
    )
    print(f"{'':32}" + "".join(f"{length:>7}" for length in size.lengths) + "  steps     s")
    for task, (table, models) in TASKS.items():
        for model, (mixer, options) in models.items():
            best = train(table, mixer, options, size)
            panels.setdefault(task, {})[model] = {int(length): value for length, value in best.accuracy.items()}
            rows.append({"task": task, "model": model, "mixer": mixer, "options": options, **best._asdict()})
            cells = "".join(f"{value:>7.3f}" for value in best.accuracy.values())
            print(f"{task + ': ' + model:32}{cells}{best.steps:>7}{best.seconds:>6.0f}", flush=True)
    write_report(f"{OUTPUT.value}/state_tracking.json", "experiments.state_tracking", rows, size=size._asdict())
    chances = {task: 1 / len(table) for task, (table, _) in TASKS.items()}
    plot_accuracy(f"{OUTPUT.value}/state_tracking.png", panels, x="tokens", chance=chances, marked=size.length)
    print(f"written: state_tracking.json, state_tracking.png in {OUTPUT.value}")


if __name__ == "__main__":
    main()
