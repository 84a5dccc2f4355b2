"""Multi-query associative recall: how many pairs does a memory of a given size hold?

    python -m experiments.recall [--full --workers=8] [--output=DIR]

A row shows pairs of a key and a value, then asks for each key once, in another order (Arora et al. 2023, "Zoology",
arXiv:2312.04927). Two blocks of each mechanism are trained on rows with different numbers of pairs and tested on each
number. A head's state is state_dim x head_dim; softmax attention keeps all keys and values. What to expect: attention
solves every row; a sum of outer products fails when the pairs exceed state_dim; the delta rule holds on longer.

Without --full: two state sizes and up to 16 pairs, minutes on a CPU. Writes recall.json and recall.png to --output.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from effattn_jax.typing import Array
from experiments.report import plot_accuracy, write_report
from experiments.small_model import Batch, Fit, SmallModel, fit, fit_all

FLAGS = flags.FlagValues()
WORKERS = flags.DEFINE_integer("workers", 1, "models that are trained at the same time", flag_values=FLAGS)
FULL = flags.DEFINE_bool("full", False, "the whole grid, for an accelerator", flag_values=FLAGS)
MIXER = flags.DEFINE_multi_string("mixer", None, "only these mechanisms; default: all of the table", flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", "runs/recall", "where recall.json and recall.png go", flag_values=FLAGS)

NOTHING = 0  # the token between the questions


class Recall(NamedTuple):
    """The task: rows of `length` tokens over `keys` keys and `values` values; tokens are 0, then keys, then values."""

    length: int
    keys: int
    values: int

    @property
    def vocab_size(self) -> int:
        return 1 + self.keys + self.values


def draw_row(key: Array, pairs: Array, task: Recall, *, power: float = 0.01) -> Batch:
    """One row of slots of two tokens. The first `pairs` slots hold (key, value), all keys different; so many of the
    later ones hold (key, nothing), every key once, and the answer is its value. Other slots are empty.

    Distances from the pairs to the questions follow a power law with exponent `power` - 1: most come soon.
    """
    name_key, value_key, slot_key = jax.random.split(key, 3)
    slots = task.length // 2
    slot = jnp.arange(slots)
    keys = 1 + jax.random.permutation(name_key, task.keys)[:slots]
    values = jax.random.randint(value_key, (slots,), 0, task.values)
    shown = slot < pairs
    # Slots drawn one after the other without replacement, by weight: the largest of log(weight) + Gumbel noise.
    weight = (power - 1) * jnp.log(jnp.maximum(slot - pairs + 1, 1)) + jax.random.gumbel(slot_key, (slots,))
    rank = jnp.argsort(jnp.argsort(-jnp.where(shown, -jnp.inf, weight)))
    asked = ~shown & (rank < pairs)
    pair = jnp.where(shown, slot, jnp.minimum(rank, slots - 1))
    first = jnp.where(shown | asked, keys[pair], NOTHING)
    second = jnp.where(shown, 1 + task.keys + values[pair], NOTHING)
    interleave = lambda a, b: jnp.stack([a, b], -1).reshape(task.length)  # noqa: E731
    none = jnp.zeros_like(asked)
    return Batch(
        interleave(first, second), interleave(jnp.where(asked, values[pair], 0), 0 * slot), interleave(asked, none)
    )


def draw(key: Array, rows: int, pairs: Sequence[int], task: Recall) -> Batch:
    """Rows with as many pairs as one of `pairs`, at random."""
    count_key, row_key = jax.random.split(key)
    counts = jax.random.choice(count_key, jnp.asarray(pairs), (rows,))
    return jax.vmap(functools.partial(draw_row, task=task))(jax.random.split(row_key, rows), counts)


class Grid(NamedTuple):
    """What is trained: every mechanism at every state size on one task."""

    task: Recall
    pairs: tuple[int, ...]
    state_dims: tuple[int, ...]
    mixers: tuple[str, ...]
    dim: int
    rows: int
    steps: int
    learning_rates: tuple[float, ...]


SMALL = Grid(
    task=Recall(length=64, keys=32, values=32),
    pairs=(2, 4, 8, 16),
    state_dims=(4, 8),
    mixers=("attention", "linear_attention", "gla", "delta_net"),
    dim=32,
    rows=32,
    steps=1600,
    learning_rates=(3e-3, 1e-2),
)
LARGE = Grid(
    task=Recall(length=128, keys=128, values=128),
    pairs=(4, 8, 16, 32),
    state_dims=(8, 32),
    mixers=("attention", "linear_attention", "gla", "mamba2", "delta_net", "gated_delta_net", "rwkv7"),
    dim=64,
    rows=64,
    steps=3000,
    learning_rates=(1e-3, 3e-3, 1e-2),
)


def options(mixer: str, dim: int, state_dim: int, length: int) -> dict[str, Any]:
    """The mixer with a state of state_dim x dim numbers: one head, or heads of state_dim channels. Mesa has two such
    states, log-linear attention one for each level, and attention keeps all it has seen."""
    one_head: dict[str, Any] = {"heads": 1, "key_dim": state_dim, "value_dim": dim}
    delta = {"heads": 1, "head_dim": state_dim, "expand_v": dim / state_dim}
    mamba = {"expand": 1, "head_dim": dim, "state_dim": state_dim}
    return {
        "attention": {"heads": 1},
        "linear_attention": one_head,
        "retention": one_head,
        "gla": {"heads": 1, "expand_k": state_dim / dim},
        "mamba2": mamba,
        "log_linear": mamba | {"max_length": length},
        "delta_net": delta,
        "gated_delta_net": delta,
        "kda": delta,
        "comba": delta,
        "rwkv7": {"head_dim": state_dim},
        "mesa_net": {"heads": dim // state_dim, "head_dim": state_dim},
    }[mixer]


def train(mixer: str, options: Mapping[str, Any], grid: Grid) -> Fit:
    """The fit of one mechanism; its evaluations are named by the number of pairs."""
    task = grid.task
    make = functools.partial(
        SmallModel,
        mixer,
        options,
        vocab_size=task.vocab_size,
        answers=task.values,
        dim=grid.dim,
        mlp_dim=2 * grid.dim,
        layers=2,
        conv_width=3,
    )
    tests = {
        str(pairs): draw(jax.random.key(1000 + pairs), max(1, 4096 // pairs // 8), (pairs,), task)
        for pairs in grid.pairs
    }
    return fit(
        lambda rngs: make(rngs=rngs),
        lambda key: draw(key, grid.rows, grid.pairs, task),
        tests,
        learning_rates=grid.learning_rates,
        steps=grid.steps,
    )


def main() -> None:
    FLAGS(sys.argv)
    grid = LARGE if FULL.value else SMALL
    jobs: dict[tuple[str, int], Callable[[], Fit]] = {}
    chosen: dict[tuple[str, int], dict[str, Any]] = {}
    for state_dim in grid.state_dims:
        for mixer in MIXER.value or grid.mixers:
            if mixer == "attention" and state_dim != grid.state_dims[0]:
                continue  # it has no state_dim: once is enough
            chosen[mixer, state_dim] = options(mixer, grid.dim, state_dim, grid.task.length)
            jobs[mixer, state_dim] = functools.partial(train, mixer, chosen[mixer, state_dim], grid)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; accuracy on rows of so many pairs")
    print(f"{'mechanism':18}{'state_dim':>10}" + "".join(f"{pairs:>7}" for pairs in grid.pairs) + "  steps     s")
    fits: dict[tuple[str, int], Fit] = {}
    for (mixer, state_dim), best in fit_all(jobs, WORKERS.value):
        cells = "".join(f"{value:>7.3f}" for value in best.accuracy.values())
        print(f"{mixer:18}{state_dim:>10}{cells}{best.steps:>7}{best.seconds:>6.0f}", flush=True)
        fits[mixer, state_dim] = best
    rows = [
        {
            "mixer": mixer,
            "state_dim": state_dim,
            "options": chosen[mixer, state_dim],
            **fits[mixer, state_dim]._asdict(),
        }
        for mixer, state_dim in jobs
    ]
    write_report(f"{OUTPUT.value}/recall.json", "experiments.recall", rows, grid=grid._asdict())
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for state_dim in grid.state_dims:
        lines = {m: fit for (m, size), fit in fits.items() if size == state_dim or m == "attention"}
        panels[f"state_dim {state_dim}"] = {
            mixer: {int(pairs): value for pairs, value in lines[mixer].accuracy.items()}
            for mixer in grid.mixers
            if mixer in lines
        }
    chances = dict.fromkeys(panels, 1 / grid.task.values)
    plot_accuracy(f"{OUTPUT.value}/recall.png", panels, x="pairs", chance=chances)
    print(f"written: recall.json, recall.png in {OUTPUT.value}")


if __name__ == "__main__":
    main()
