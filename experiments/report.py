"""What an experiment leaves behind: a JSON file with versions, device and command, and a picture of its lines."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def write_report(path: str, module: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """`rows` beside what they were measured with; `module` is the name after `python -m`."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        **more,
        "rows": list(rows),
    }
    with open(path, "w") as file:
        json.dump(report, file, indent=1)
        file.write("\n")


def plot_accuracy(
    path: str,
    panels: Mapping[str, Mapping[str, Mapping[int, float]]],
    *,
    x: str,
    chance: Mapping[str, float],
    marked: int | None = None,
) -> None:
    """A panel per title, a line per name, accuracy against a number on a logarithmic axis.

    Args:
      path: of the PNG to write.
      panels: title -> name -> number -> accuracy.
      x: what the number is.
      chance: title -> accuracy of a guess, a dashed line.
      marked: a number to mark by a vertical line, such as the length of training.
    """
    figure = Figure(figsize=(1 + 4 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for name, line in lines.items():
            style = names.index(name)
            axes.plot(
                *zip(*sorted(line.items()), strict=True),
                color=colormaps["tab10"](style % 10),
                marker="os^Dvp*"[style % 7],
                markersize=4,
                label=name,
            )
        axes.axhline(chance[title], color="#737373", linewidth=1, linestyle=(0, (4, 3)))
        if marked is not None:
            axes.axvline(marked, color="#737373", linewidth=1, linestyle=(0, (1, 2)))
        axes.set_xscale("log", base=2)
        axes.set_xlabel(x)
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    all_axes[0].set_ylabel("accuracy")
    all_axes[0].set_ylim(-0.02, 1.02)
    handles = {
        label: handle for axes in all_axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside right center")
    figure.savefig(path, dpi=150)


def plot_curves(
    path: str, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], *, x: str, y: str, top: float
) -> None:
    """A panel per title, a line per name, through its points, on the same vertical axis up to `top`."""
    figure = Figure(figsize=(1 + 4.5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for name, points in lines.items():
            style = names.index(name)
            axes.plot(
                *zip(*points, strict=True),
                color=colormaps["tab10"](style % 10),
                marker="os^Dvp*"[style % 7] if len(points) < 20 else None,
                markersize=4,
                label=name,
            )
        axes.set_xlabel(x)
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    all_axes[0].set_ylabel(y)
    all_axes[0].set_ylim(top=top)
    figure.legend(*all_axes[0].get_legend_handles_labels(), frameon=False, loc="outside right center")
    figure.savefig(path, dpi=150)
