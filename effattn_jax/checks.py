"""Checks of arguments at trace time: one line that names the argument, what it got and what it needs."""

from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np


class ArgumentError(ValueError):
    """An argument or a field of a config that does not fit; the message is one line."""


def fail(argument: str, got: object, needs: str) -> NoReturn:
    raise ArgumentError(f"{argument}: got {got}; needs {needs}")


def check_shape(argument: str, array: Any, shape: Sequence[int | None], names: str) -> None:
    """Each size must equal its entry of `shape`; None takes any. `names` is the shape in letters, for the message."""
    got = jnp.shape(array)
    if len(got) != len(shape) or any(want is not None and size != want for size, want in zip(got, shape, strict=True)):
        sizes = ", ".join("any" if want is None else str(want) for want in shape)
        fail(argument, f"shape {got}", f"{names} = [{sizes}]")


def check_rank(argument: str, array: Any, rank: int, names: str) -> None:
    if jnp.ndim(array) != rank:
        fail(argument, f"shape {jnp.shape(array)}", f"{rank} dimensions {names}")


def check_floating(argument: str, array: Any) -> None:
    if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
        fail(argument, f"dtype {jnp.result_type(array)}", "a floating dtype")


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    if value is not None and value not in choices:
        fail(argument, repr(value), f"None or one of {', '.join(choices)}")


def check_head_groups(argument: str, heads: int, of: str, total: int) -> None:
    """`heads` must divide `total`: each serves total // heads consecutive heads of `of`."""
    if heads < 1 or total % heads:
        fail(argument, f"{heads} heads", f"a number that divides the {total} heads of {of}")


def check_segment_ids(segment_ids: Any, batch: int, length: int) -> None:
    """[B, T] integers, non-decreasing along a row where not negative (negative marks padding).

    The order can be checked only on values that are known at trace time.
    """
    if segment_ids is None:
        return
    check_shape("segment_ids", segment_ids, (batch, length), "[B, T]")
    if not jnp.issubdtype(jnp.result_type(segment_ids), jnp.integer):
        fail("segment_ids", f"dtype {jnp.result_type(segment_ids)}", "an integer dtype")
    if isinstance(segment_ids, jax.core.Tracer):
        return
    ids = np.asarray(segment_ids)
    for row, values in enumerate(ids):
        documents = values[values >= 0]
        if np.any(np.diff(documents) < 0):
            fail("segment_ids", f"a row ({row}) that decreases", "ids that never decrease along a row")
