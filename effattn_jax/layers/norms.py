"""The norms a block can name: `norm(dim, eps=..., dtype=...)`."""

import functools
from collections.abc import Callable
from typing import Any

from effattn_jax.layers.layer_norm import LayerNorm
from effattn_jax.layers.rms_norm import RMSNorm

NORMS: dict[str, Callable[..., Any]] = {
    "rms": RMSNorm,
    "rms_about_one": functools.partial(RMSNorm, about_one=True),
    "layer": LayerNorm,
}
"""`rms`: RMSNorm; `rms_about_one`: its scale is stored less one (Gemma, Qwen3-Next); `layer`: LayerNorm (RWKV)."""
