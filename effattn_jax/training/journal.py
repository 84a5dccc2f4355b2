"""What a run says of its steps: metrics on disk, the progress line, and the alarm when a loss is not finite."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import optax

from effattn_jax.training.evaluation import Evaluation
from effattn_jax.training.metrics import MetricWriter
from effattn_jax.training.progress import TrainProgress


class NonFiniteLoss(RuntimeError):
    """Loss, gradient or parameters are not finite; the message names the step and the last good checkpoint."""


class Workload(NamedTuple):
    """What a step amounts to."""

    tokens: int
    flops: float
    peak_flops: float | None  # of all devices together; None where it is not known


class Journal:
    """Records steps one after the other; speed is that of the last few. Time in `paused` does not count as training."""

    def __init__(
        self,
        metrics: MetricWriter,
        progress: TrainProgress,
        schedule: optax.Schedule,
        workload: Workload,
        log_every: int,
    ) -> None:
        self._metrics, self._progress, self._schedule = metrics, progress, schedule
        self._workload, self._log_every = workload, log_every
        self._paused = 0.0
        self._ends = deque([time.perf_counter()], maxlen=21)  # of the last steps, pauses taken out

    def step(self, step: int, values: Mapping[str, Any], last_good: Callable[[], int | None]) -> None:
        """Wait for the values of a step, check and record them.

        Raises:
          NonFiniteLoss: with the step and the newest checkpoint, from `last_good()`.
        """
        numbers = {name: float(value) for name, value in values.items()}
        loss = numbers["loss"]
        if not all(map(math.isfinite, numbers.values())):
            got = ", ".join(f"{name.replace('_', ' ')} {number:g}" for name, number in numbers.items())
            good = last_good()
            where = "there is no checkpoint yet" if good is None else f"the last good checkpoint is step {good}"
            raise NonFiniteLoss(f"step {step} is not finite ({got}): training stops; {where}")
        self._ends.append(time.perf_counter() - self._paused)
        steps_per_second = (len(self._ends) - 1) / (self._ends[-1] - self._ends[0])
        speed = steps_per_second * self._workload.tokens
        peak = self._workload.peak_flops
        mfu = None if peak is None else steps_per_second * self._workload.flops / peak
        self._progress.update(step, loss, speed, mfu)
        if step % self._log_every == 0:
            line = numbers | {
                "loss_bits": loss / math.log(2),
                "learning_rate": float(self._schedule(step - 1)),
                "tokens_per_second": speed,
            }
            self._metrics.write(step, "train", line if mfu is None else line | {"mfu": mfu})

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        self._metrics.write(step, "validation", {"loss": evaluation.loss, "bits_per_byte": evaluation.bits_per_byte})

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began
