"""What does learned routing cost? Full attention, MoBA and NSA from scratch on the same tokens in the same order.

    python -m experiments.routed_curves                                    # two CPU cores, 11 minutes
    python -m experiments.routed_curves --full --output=runs/routed_125m   # one accelerator

Same seed, same model but for the mixer: `configs/routed_small.py` or, with --full, `configs/routed_125m.py`. A run is
in <output>/<mechanism>, and goes on from its checkpoint if the command is given again. After each of them
routed_curves.json and routed_curves.png in --output have what there is.

--lists names the implementation of `block_attention`; by default it takes the cheaper one, on a GPU "dense" for rows of
this length.
"""

import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from configs import routed_125m, routed_small
from effattn_jax.training.loop import Result, train
from effattn_jax.training.metrics import FILE, read_metrics
from experiments.report import plot_curves, write_report

FLAGS = flags.FlagValues()
FULL = flags.DEFINE_bool("full", False, "125M parameters, for an accelerator", flag_values=FLAGS)
STEPS = flags.DEFINE_integer("steps", None, "of every run; default: those of the config", flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "of parameters and of the order of documents", flag_values=FLAGS)
MECHANISM = flags.DEFINE_multi_enum(
    "mechanism", ["attention", "moba", "nsa"], list(routed_small.MIXERS), "what is trained", flag_values=FLAGS
)
LISTS = flags.DEFINE_enum("lists", None, ["xla", "dense"], "how listed blocks are read", flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", "runs/routed", "where everything goes", flag_values=FLAGS)

POINTS = 50  # of a training curve


def configured(name: str, *, full: bool, steps: int | None, seed: int, lists: str | None) -> ConfigDict:
    config = (routed_125m if full else routed_small).get_config(name)
    config.seed = seed
    if steps is not None:
        config.train.steps = config.train.checkpoint_every = steps
        config.train.eval_every = max(1, steps // 4)
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps // 5)
    if lists is not None and name != "attention":
        config.model.mixers[name].implementation = lists
    return config


def row(name: str, config: ConfigDict, workdir: str, result: Result, seconds: float) -> dict[str, Any]:
    """What the report says of a run; curves are of bits per byte."""
    lines = read_metrics(os.path.join(workdir, FILE))
    training = [line for line in lines if line["split"] == "train"]
    assert result.evaluation is not None, "a finished run has been evaluated"
    return {
        "mechanism": name,
        "options": config.model.mixers[name].to_dict(),
        "parameters": sum(x.size for x in jax.tree.leaves(result.parameters)),
        "steps": result.step,
        "bits_per_byte": result.evaluation.bits_per_byte,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in training),
        "seconds": round(seconds, 1),
        "held_out": [(line["step"], line["bits_per_byte"]) for line in lines if line["split"] == "validation"],
        "training": smoothed([(line["step"], line["loss_bits"]) for line in training]),
    }


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means of steps that follow each other, about `POINTS` of them."""
    size = -(-len(points) // POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(statistics.mean(step for step, _ in part), statistics.mean(y for _, y in part)) for part in parts]


def report(rows: Sequence[dict[str, Any]], **more: Any) -> None:
    write_report(f"{OUTPUT.value}/routed_curves.json", "experiments.routed_curves", rows, **more)
    early = max(1, rows[0]["steps"] // 10)
    curves = {
        title: {r["mechanism"]: r[key] for r in rows}
        for title, key in (("training", "training"), ("held out", "held_out"))
    }
    top = max(y for lines in curves.values() for line in lines.values() for step, y in line if step >= early)
    plot_curves(f"{OUTPUT.value}/routed_curves.png", curves, x="step", y="bits per byte", top=top)


def main() -> None:
    FLAGS(sys.argv)
    rows: list[dict[str, Any]] = []
    for name in MECHANISM.value:
        config = configured(name, full=FULL.value, steps=STEPS.value, seed=SEED.value, lists=LISTS.value)
        workdir = os.path.abspath(os.path.join(OUTPUT.value, name))
        began = time.perf_counter()
        result = train(config, workdir)
        if result.stopped_by is not None:
            raise SystemExit(f"{name} was stopped by {result.stopped_by} after step {result.step}")
        rows.append(row(name, config, workdir, result, time.perf_counter() - began))
        report(
            rows,
            lists=LISTS.value,
            batch_size=config.data.batch_size,
            sequence_length=config.data.sequence_length,
            held_out_bytes=result.evaluation.bytes if result.evaluation else 0,
        )
        last = rows[-1]
        print(
            f"{name}: {last['parameters']:,} parameters, {last['tokens_per_second']:,.0f} tokens/s, held-out "
            f"{last['bits_per_byte']:.4f} bits per byte after {last['steps']} steps, {last['seconds']:.0f} s in all",
            flush=True,
        )
    print(f"written: routed_curves.json, routed_curves.png in {OUTPUT.value}")


if __name__ == "__main__":
    main()
