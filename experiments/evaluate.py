"""Evaluate a trained model on the held-out text: bits per byte, and the loss by position in a document.

    python -m experiments.evaluate --config=configs/quickstart.py --workdir=runs/quickstart --length=2048

Rows of --length tokens, by default four times those of training, show whether the loss keeps falling, or at least does
not rise, beyond what training has seen: a memory of fixed size and a window should carry on. Writes evaluation.json and
positions.png to the workdir.
"""

import json
import math
import os

import jax
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from effattn_jax.training.evaluation import Evaluation, evaluate, make_evaluation_step
from effattn_jax.training.restore import restore_params
from effattn_jax.training.setup import heldout_batches, make_setup
from experiments import cli

LENGTH = flags.DEFINE_integer("length", None, "tokens in a row; default: four times data.sequence_length")
BUCKETS = flags.DEFINE_integer("buckets", 8, "ranges of positions, each twice as long as the one before")
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the newest")


def main(config: ConfigDict, workdir: str) -> None:
    setup = make_setup(config)
    trained = config.data.sequence_length
    heldout = heldout_batches(config, setup.tokenizer, LENGTH.value or 4 * trained)
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=setup.shardings.parameters[name])
        for name, x in setup.blueprint.shapes.items()
    }
    step, parameters = restore_params(os.path.join(workdir, "checkpoints"), shapes, step=STEP.value)
    result = evaluate(
        make_evaluation_step(setup.blueprint, setup.mesh), parameters, heldout, heldout.byte_count, setup.mesh
    )
    ranges = result.loss_by_position(BUCKETS.value)
    print(f"step {step}, {result.bytes:,} held-out bytes: {result.bits_per_byte:.4f} bits per byte\n")
    print(f"loss by position in the document (rows of training had {trained} tokens):")
    print(f"  {'positions':>14}  bits per token")
    for first, last, nats in ranges:
        beyond = "  beyond the length of training" if first >= trained else ""
        print(f"  {first:>6} .. {last:>5}  {nats / math.log(2):.4f}{beyond}")
    _write(workdir, step, result, ranges)
    _plot(os.path.join(workdir, "positions.png"), ranges, trained)
    print(f"\nwritten: evaluation.json, positions.png in {workdir}")


def _write(workdir: str, step: int, result: Evaluation, ranges: list[tuple[int, int, float]]) -> None:
    summary = {
        "step": step,
        "bits_per_byte": result.bits_per_byte,
        "bytes": result.bytes,
        "bits_by_position": [{"first": a, "last": b, "bits": nats / math.log(2)} for a, b, nats in ranges],
    }
    with open(os.path.join(workdir, "evaluation.json"), "w") as file:
        json.dump(summary, file, indent=2)
        file.write("\n")


def _plot(path: str, ranges: list[tuple[int, int, float]], trained: int) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edges = [ranges[0][0], *(last + 1 for _, last, _ in ranges)]
    axes.stairs([nats / math.log(2) for _, _, nats in ranges], edges, color="#08519c", linewidth=2, baseline=None)
    axes.axvline(trained, color="#737373", linestyle=(0, (4, 3)), linewidth=1)
    axes.annotate(" length of training", (trained, axes.get_ylim()[1]), va="top", color="#737373", fontsize="small")
    axes.set_xscale("symlog", base=2, linthresh=8)
    axes.set_xlabel("position in the document")
    axes.set_ylabel("bits per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    cli.run(main, __doc__)
