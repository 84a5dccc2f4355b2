"""Frequencies of rotary positions beyond the length that a model was trained with."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from effattn_jax import checks
from effattn_jax.typing import Float

KINDS = ("linear", "llama3", "yarn", "factors")


class RopeScaling(NamedTuple):
    """The angles w_i = theta^{-2 i / R}, i < R / 2, of rotary positions become w'_i; sines and cosines are
    multiplied by `attention_factor`.

    linear   w_i / factor (Chen et al. 2023, arXiv:2306.15595)
    llama3   w_i / factor below a turn in original_length / low_frequency tokens, w_i above one in original_length /
             high_frequency, in between a mixture, linear in original_length / wavelength (arXiv:2407.21783)
    yarn     a mixture of w_i / factor and w_i, linear in i between the channels that turn `slow` and `fast` times in
             original_length tokens, whole channels with `truncate`; the attention factor is 0.1 ln(factor) + 1 (Peng
             et al. 2023, arXiv:2309.00071)
    factors  w_i / factors_i (LongRoPE, Ding et al. 2024, arXiv:2402.13753)

    Args:
      kind: one of these.
      attention_factor: None is that of the kind, 1 where it says none.
    """

    kind: str
    factor: float = 1.0
    original_length: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()
    attention_factor: float | None = None

    @classmethod
    def of(cls, options: "RopeScaling | Mapping[str, Any] | None") -> "RopeScaling | None":
        """From the options of a config.

        Raises:
          ValueError: a kind that is not known, or without the length it needs.
        """
        if options is None:
            return None
        found = options if isinstance(options, RopeScaling) else cls(**dict(options))
        if found.kind not in KINDS:
            checks.fail("rope_scaling.kind", repr(found.kind), f"one of {', '.join(KINDS)}")
        if found.kind in ("llama3", "yarn") and found.original_length < 1:
            checks.fail("rope_scaling.original_length", found.original_length, "the length of training")
        return found._replace(factors=tuple(found.factors))

    @property
    def amplitude(self) -> float:
        """What sines and cosines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.kind == "yarn" and self.factor > 1 else 1.0


def frequencies(theta: float, rotated: int, scaling: RopeScaling | None) -> Float[np.ndarray, " R/2"]:
    """Angles per token, in float32.

    Raises:
      ValueError: other than R / 2 factors.
    """
    plain = (theta ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)).astype(np.float32)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / np.float32(scaling.factor)
    if scaling.kind == "factors":
        if len(scaling.factors) != rotated // 2:
            checks.fail("rope_scaling.factors", f"{len(scaling.factors)} factors", f"{rotated // 2}, one for each pair")
        return plain / np.asarray(scaling.factors, np.float32)
    slow = plain / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        turns = scaling.original_length * plain / (2 * np.pi)  # in the original length
        width = scaling.high_frequency - scaling.low_frequency
        own = np.clip((turns - scaling.low_frequency) / width, 0, 1)
    else:
        own = 1 - _yarn_ramp(theta, rotated, scaling)
    return (slow * (1 - own) + plain * own).astype(np.float32)


def _yarn_ramp(theta: float, rotated: int, scaling: RopeScaling) -> Float[np.ndarray, " R/2"]:
    """0 where a pair turns often, 1 where it turns rarely."""
    pair_of = lambda turns: (  # noqa: E731
        rotated * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
    )
    low, high = pair_of(scaling.fast), pair_of(scaling.slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    return np.clip((np.arange(rotated // 2) - low) / max(high - low, 1e-3), 0, 1)
