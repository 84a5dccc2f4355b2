"""The learning curve of a run as a picture."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from effattn_jax.training.metrics import read_metrics

_TRAIN, _VALIDATION, _BASELINE = "#9ecae1", "#08519c", "#737373"


def plot_losses(
    metrics_path: str,
    output_png: str,
    baselines: Mapping[str, float] | None = None,
    *,
    train_key: str = "loss_bits",
    validation_key: str = "bits_per_byte",
    unit: str = "bits per byte",
    title: str = "",
) -> None:
    """Draws the training loss, the held-out loss and a horizontal line for each baseline.

    Args:
      metrics_path: a metrics.jsonl file with splits "train" and "validation"; either may be absent.
      output_png: written.
      baselines: from label to value, in the same unit.
      train_key, validation_key: names of the two metrics.
      unit: label of the vertical axis.

    Raises ValueError if the file has neither metric.
    """
    lines = read_metrics(metrics_path)
    train = _curve(lines, "train", train_key)
    validation = _curve(lines, "validation", validation_key)
    if not train and not validation:
        raise ValueError(f"{metrics_path}: got no finite {train_key} (train) or {validation_key} (validation)")

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color=_TRAIN, linewidth=1, label="train")
    if validation:
        axes.plot(
            *zip(*validation, strict=True), color=_VALIDATION, linewidth=2, marker="o", markersize=3.5, label="held out"
        )
        step, value = validation[-1]
        axes.annotate(f"{value:.3f}", (step, value), (0, 7), textcoords="offset points", ha="center", color=_VALIDATION)
    for rank, (label, value) in enumerate(sorted((baselines or {}).items(), key=lambda line: line[1])):
        axes.axhline(value, color=_BASELINE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"{label} {value:.3f}",
            (0.7 - 0.2 * (rank % 3), value),  # side by side, so that lines close to each other stay readable
            (-4, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
            color=_BASELINE,
            fontsize="small",
        )
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(output_png, dpi=150)


def _curve(lines: list[dict[str, Any]], split: str, key: str) -> list[tuple[int, float]]:
    return [
        (line["step"], line[key]) for line in lines if line["split"] == split and math.isfinite(line.get(key, math.nan))
    ]
