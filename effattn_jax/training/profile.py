"""A profile of a few steps, for TensorBoard or Perfetto."""

from collections.abc import Callable
from typing import Any, Self

import jax


class ProfileWindow:
    """Traces steps start, ..., start + steps - 1 with `jax.profiler` into `logdir`. A context manager.

    Args:
      logdir: where the trace goes; created.
      start: first step of the window; let compilation and warm-up pass.
      steps: how many; 0 traces nothing.
      report: receives one line with the directory when the trace is written.
    """

    def __init__(self, logdir: str, start: int, steps: int, report: Callable[[str], None] = print) -> None:
        self._logdir, self._window, self._report = logdir, range(start, start + steps), report
        self._running = False

    def step(self, i: int, result: Any = None) -> None:
        """Call before step i. `result`, an output of the step before, is waited for at both ends of the window."""
        if (i in self._window) == self._running:
            return
        jax.block_until_ready(result)
        if self._running:
            self.close()
        else:
            jax.profiler.start_trace(self._logdir)
            self._running = True

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._report(f"profile written to {self._logdir}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
