"""The figure of `sparse_quality`: what is kept of a model, against the share of the keys that was read."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.sparse_evaluation import DECODE, DENSE, PREFILL
from experiments.sparse_methods import RANDOM

GREY = "#737373"
COLUMNS = {"bits_per_byte": "bits per byte", "recall": "needles found"}


def plot(path: str, rows: Sequence[Mapping[str, Any]], chance: float) -> None:
    """A row of panels for prefill and one for decoding; dense reading is a dashed line, and a dotted one is a
    guess among the needles of a row."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True)
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m not in (DENSE, RANDOM)]
    for phase, of_phase in zip((PREFILL, DECODE), panels, strict=True):
        for (column, label), axes in zip(COLUMNS.items(), of_phase, strict=True):
            here = [row for row in rows if row["phase"] == phase]
            for method in [*methods, RANDOM]:
                line = sorted((row["read"], row[column]) for row in here if row["method"] == method)
                if line:
                    axes.plot(*zip(*line, strict=True), label=method, **_style(method, methods))
            for row in here:
                if row["method"] == DENSE:
                    axes.axhline(row[column], color="black", linewidth=1, linestyle=(0, (4, 3)), label=DENSE)
            axes.set_xscale("log", base=2)
            axes.set_title(f"{label}, {phase}", loc="left", fontsize="medium")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.3)
        of_phase[1].axhline(chance, color=GREY, linewidth=1, linestyle=(0, (1, 2)))
        of_phase[1].set_ylim(-0.02, 1.02)
        handles, labels = of_phase[0].get_legend_handles_labels()
        of_phase[1].legend(handles, labels, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in panels[1]:
        axes.set_xlabel("share of the keys that is read")
    figure.savefig(path, dpi=110)


def _style(method: str, methods: Sequence[str]) -> dict[str, Any]:
    if method == RANDOM:
        return {"color": GREY, "marker": "x", "markersize": 5, "linewidth": 2}
    number = methods.index(method)
    return {"color": colormaps["tab10"](number % 10), "marker": "os^Dvp*"[number % 7], "markersize": 4}
