"""Timing on a device: compile first, then the median over repetitions of many calls in flight, or of loops."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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


class Time(NamedTuple):
    milliseconds: float
    spread: float  # (longest - shortest) / median
    first_call: float  # seconds of tracing, compiling and running once


def timed(
    call: Callable[[dict[str, Any]], Any],
    inputs: dict[str, Any],
    *,
    carried: str | None = None,
    repetitions: int = 7,
    seconds: float = 0.03,
) -> Time:
    """One pass of a loop under one jit, whose every pass depends on the one before; launches are no part of it.

    Args:
      call: of the inputs, by name.
      carried: the input that the next pass takes from this one, the second of two results.
      repetitions: loops, of about `seconds` each.
    """

    def results(inputs: dict[str, Any]) -> tuple[Any, Any]:
        return (call(inputs), None) if carried is None else call(inputs)

    def loop(inputs: dict[str, Any], passes: jax.Array) -> Any:
        def one(_: Any, carry: Any) -> Any:
            fixed, kept, out = carry
            fixed, _ = jax.lax.optimization_barrier((fixed, out))
            out, kept = results(fixed if carried is None else fixed | {carried: kept})
            return fixed, kept, out

        kept = None if carried is None else inputs[carried]
        fixed = {name: x for name, x in inputs.items() if name != carried}
        out = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(results, inputs)[0])
        return jax.lax.fori_loop(0, passes, one, (fixed, kept, out))[1:]

    compiled = jax.jit(loop)

    def once(passes: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(compiled(inputs, jnp.int32(passes)))
        return time.perf_counter() - began

    first = once(1)
    few = 2
    once(few)
    passes = few + max(4, int(seconds / max((once(few + 10) - once(few)) / 10, 1e-6)))
    times = [1e3 * (once(passes) - once(few)) / (passes - few) for _ in range(repetitions)]
    middle = statistics.median(times)
    return Time(middle, (max(times) - min(times)) / middle, first)


def only_on_a_gpu(script: str) -> None:
    """Raises SystemExit, with one line, where JAX finds no GPU."""
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError):  # JAX_PLATFORMS asks for what is not there
        found = "missing"
    if found != "gpu":
        raise SystemExit(f"{script} needs an NVIDIA GPU; JAX's backend here is {found}")
