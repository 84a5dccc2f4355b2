"""What does reading a few of the keys cost a model that was trained to read them all?

    python -m experiments.sparse_quality [--full] [--workdir=DIR] [--output=DIR]

A small dense model is trained on bytes of the Python library's source with needles planted in it (a letter and its
value, asked for at the end of a row). Then each inference method reads for it, at several budgets and in all layers: at
prefill MInference, FlexPrefill, XAttention, SpargeAttn and StreamingLLM; at decoding, after a dense prefill, Quest,
Double Sparsity, H2O, SnapKV, ClusterKV, RetroInfer and StreamingLLM. Quality is bits per byte of held-out text and the
part of the needles that is found; the share of the keys that was read is counted, not the budget. Dense reading is the
ceiling, as many keys at random the floor.

The small size takes two CPU cores an hour and more, most of it training; `--full` is for an accelerator and has not
been run.

The parameters stay in --workdir, and the same command evaluates them again. `configs/sparse_quality.py` has all sizes.
Writes sparse_quality.json and sparse_quality.png to --output.
"""

import functools
import os
import sys
from typing import Any

import jax
from absl import flags

from configs.sparse_quality import get_config
from experiments.report import write_report
from experiments.sparse_evaluation import Quality, case_of, held_out, quality, settings
from experiments.sparse_figure import plot
from experiments.sparse_training import trained

FLAGS = flags.FlagValues()
FULL = flags.DEFINE_bool("full", False, "the larger model and rows, for an accelerator", flag_values=FLAGS)
METHOD = flags.DEFINE_multi_string("method", None, "only these, such as quest; default: all", flag_values=FLAGS)
WORKDIR = flags.DEFINE_string("workdir", None, "where the parameters are; default: --output", flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", "runs/sparse_quality", "where the report goes", flag_values=FLAGS)


def main() -> None:
    FLAGS(sys.argv)
    config = get_config("full" if FULL.value else "small")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    model = trained(config, WORKDIR.value or OUTPUT.value, functools.partial(print, flush=True))
    case = case_of(config, model, held_out(config))
    rows: list[dict[str, Any]] = []
    print(f"\n{'':26}" + "".join(f"{name:>14}" for name in ("budget", *Quality._fields)))
    for phase, method, share, options in settings(tuple(config.sweep.shares), case.sizes):
        if METHOD.value and method not in (*METHOD.value, "dense"):
            continue
        found = quality(case, phase, method, options)
        print(f"{phase:10}{method:16}{share:>14.4f}" + "".join(f"{value:>14.4f}" for value in found), flush=True)
        rows.append({"phase": phase, "method": method, "budget": share, "options": spelled(options), **found._asdict()})
        jax.clear_caches()  # no program is needed twice, and each holds memory maps
    write_report(
        os.path.join(OUTPUT.value, "sparse_quality.json"),
        "experiments.sparse_quality",
        rows,
        parameters=sum(x.size for x in model.parameters.values()),
        steps=model.steps,
        training_seconds=model.seconds,
        test=config.test.to_dict(),
    )
    plot(os.path.join(OUTPUT.value, "sparse_quality.png"), rows, chance=1 / config.test.needles)
    print(f"written: sparse_quality.json, sparse_quality.png in {OUTPUT.value}")


def spelled(options: dict[str, Any]) -> dict[str, Any]:
    """Named tuples with their names."""
    return {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in options.items()}


if __name__ == "__main__":
    main()
