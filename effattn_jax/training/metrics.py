"""Metrics of a run: one JSON object a line, and TensorBoard if wanted."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any, Self

FILE = "metrics.jsonl"
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # JSON has no numbers for these


class MetricWriter:
    """Appends lines `{"step": 10, "split": "train", "loss": 2.5}` to `<workdir>/metrics.jsonl`.

    Args:
      workdir: created if absent.
      tensorboard: also write event files to `<workdir>/tensorboard`, tags `<split>/<name>`.
      active: False writes nothing (every process but the first).
    """

    def __init__(self, workdir: str, tensorboard: bool = False, active: bool = True) -> None:
        self._active, self._tensorboard = active, tensorboard
        self._path, self._events_path = os.path.join(workdir, FILE), os.path.join(workdir, "tensorboard")
        self._file: Any = None
        self._events: Any = None
        self._purge: int | None = None  # TensorBoard forgets events from this step on

    def resume(self, step: int | None) -> None:
        """Drops the lines of steps after `step` (None: every line) and a half-written last one; before any `write`."""
        if not self._active:
            return
        self._purge = 0 if step is None else step + 1
        if not os.path.exists(self._path):
            return
        lines = [] if step is None else [line for line in read_metrics(self._path) if line["step"] <= step]
        with open(self._path + ".tmp", "w") as file:
            file.writelines(_encode(line) for line in lines)
        os.replace(self._path + ".tmp", self._path)

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Values are anything float() takes."""
        if not self._active:
            return
        if self._file is None:
            self._open()
        numbers = {name: float(value) for name, value in values.items()}
        self._file.write(_encode({"step": int(step), "split": split, **numbers}))
        self._file.flush()
        if self._events:
            for name, number in numbers.items():
                self._events.add_scalar(f"{split}/{name}", number, step)

    def close(self) -> None:
        for sink in (self._file, self._events):
            if sink:
                sink.close()
        self._file = self._events = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
        self._file = open(self._path, "a")  # noqa: SIM115
        if self._tensorboard:
            from tensorboardX import SummaryWriter  # slow to import, and optional

            self._events = SummaryWriter(self._events_path, purge_step=self._purge)


def read_metrics(path: str) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order. A last line that was not completely written is left out.

    Raises ValueError for any other line that is no JSON object.
    """
    with open(path) as file:
        lines = file.read().split("\n")
    metrics = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            metrics.append({name: _NOT_FINITE.get(value, value) for name, value in json.loads(line).items()})
        except (ValueError, AttributeError):
            raise ValueError(f"{path}, line {number}: got {line[:60]!r}; needs a JSON object") from None
    return metrics


def _encode(line: Mapping[str, Any]) -> str:
    names = {repr(number): name for name, number in _NOT_FINITE.items()}
    values = {
        key: names[repr(value)] if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return json.dumps(values, allow_nan=False) + "\n"
