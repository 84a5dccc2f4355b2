"""Timing on a device: compile first, then the median over repetitions of many calls in flight."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def milliseconds(call: Callable[..., Any], *arguments: Any, seconds: float = 0.3, repetitions: int = 5) -> float:
    """Median time of a call, each repetition long enough (about `seconds` in all) to hide the launch."""
    jax.block_until_ready(call(*arguments))
    began = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    once = time.perf_counter() - began
    calls = max(1, int(seconds / repetitions / max(once, 1e-6)))
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        result = None
        for _ in range(calls):
            result = call(*arguments)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - began) / calls)
    return 1e3 * statistics.median(times)
