"""Checks that the functions of softmax attention share."""

import math
from typing import Any

import jax
import numpy as np

from effattn_jax import checks
from effattn_jax.typing import Array


def check_qkv(q: Array, k: Array, v: Array) -> None:
    """[B, T, H, K], [B, M, G, K] and [B, M, G, V] of floats; G divides H."""
    for name, x, letters in (("q", q, "[B, T, H, K]"), ("k", k, "[B, M, G, K]"), ("v", v, "[B, M, G, V]")):
        checks.check_rank(name, x, 4, letters)
        checks.check_floating(name, x)
    batch, _, heads, key_dim = q.shape
    checks.check_shape("k", k, (batch, None, None, key_dim), "[B, M, G, K]")
    checks.check_shape("v", v, (batch, k.shape[1], k.shape[2], None), "[B, M, G, V]")
    checks.check_head_groups("k", k.shape[2], "q", heads)


def check_window(window: int | None) -> None:
    if window is not None and (isinstance(window, bool) or not isinstance(window, int | np.integer) or window < 1):
        checks.fail("window", window, "None or an int of at least 1, the number of visible keys")


def check_sinks(sinks: Array | None, heads: int) -> None:
    if sinks is not None:
        checks.check_shape("sinks", sinks, (heads,), "[H]")
        checks.check_floating("sinks", sinks)


def check_numbers(scale: float | None, logits_soft_cap: float | None) -> None:
    """None, or finite Python numbers; a cap is above 0."""
    if scale is not None:
        _check_number("scale", scale)
    if logits_soft_cap is not None:
        _check_number("logits_soft_cap", logits_soft_cap)
        if logits_soft_cap <= 0:
            checks.fail("logits_soft_cap", logits_soft_cap, "None or a number above 0")


def _check_number(argument: str, value: Any) -> None:
    if isinstance(value, jax.Array) or not math.isfinite(value):
        checks.fail(argument, value, "None or a finite Python number")
