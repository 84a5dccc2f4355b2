"""The progress of training: one live line on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress


class TrainProgress:
    """Shows step, loss, tokens per second, model FLOPs utilisation and the time left. A context manager.

    Args:
      steps: length of the run.
      start: steps done already (a resumed run).
      active: False shows nothing (every process but the first).
      console: where to; standard output if None.
      interval: seconds between lines where output is no terminal.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        steps: int,
        start: int = 0,
        *,
        active: bool = True,
        console: Console | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._active = steps, active
        self._first: tuple[int, float] | None = None  # the first step shown, and when
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._interval, self._clock = interval, clock
        self._shown = clock()
        self._live = active and self._console.is_terminal
        self._bar = RichProgress(
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=self._console,
            refresh_per_second=4,
            disable=not self._live,
        )
        self._task = self._bar.add_task("train", total=steps, completed=start, numbers="")

    def __enter__(self) -> Self:
        self._bar.start()
        self._shown = self._clock() - self._interval  # the first update is shown
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float, mfu: float | None = None) -> None:
        """`step` steps are done; `mfu` is a fraction, None where the device's peak is not known."""
        if not self._active:
            return
        now = self._clock()
        if self._first is None:  # what came before, compilation above all, says nothing of the time left
            self._first = step, now
        first, began = self._first
        left = (now - began) / (step - first) * (self._steps - step) if step > first else None
        numbers = numbers_text(loss, tokens_per_second, mfu, left)
        if self._live:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif now - self._shown >= self._interval or step >= self._steps:
            self._shown = now
            self.log(f"step {step}/{self._steps}  {numbers}")

    def log(self, message: str) -> None:
        """Prints a line above the bar."""
        if self._active:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)


def numbers_text(loss: float, tokens_per_second: float, mfu: float | None, seconds_left: float | None) -> str:
    parts = [f"loss {loss:.3f}", f"{short_number(tokens_per_second)} tok/s"]
    if mfu is not None:
        parts.append(f"MFU {mfu:.1%}")
    if seconds_left is not None:
        parts.append(f"ETA {timedelta(seconds=round(seconds_left))}")
    return "  ".join(parts)


def short_number(value: float) -> str:
    """Three significant digits: 950, 12.3k, 4.56M, 1.2G."""
    for unit in ("", "k", "M"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"
