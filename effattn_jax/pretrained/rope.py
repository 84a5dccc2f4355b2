"""Rotary positions as published configs spell them, in the two ways that transformers has had."""

import math
from typing import Any

from effattn_jax import checks
from effattn_jax.pretrained.family import Config


def rope_options(config: Config, kind: str | None = None) -> dict[str, Any]:
    """`rope_theta`, `rope_fraction` and `rope_scaling` of a layer; `kind` names its entry where kinds differ.

    Reads `rope_parameters`, else `rope_theta`, `partial_rotary_factor` and `rope_scaling` of the older spelling.

    Raises:
      ValueError: a type of scaling that is not supported.
    """
    given = config.get("rope_parameters") or {}
    if kind in given:
        given = given[kind]
    plain = {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    plain |= {key: config[key] for key in plain if key in config}
    scaling: dict[str, Any] = {**plain, **(config.get("rope_scaling") or {}), **given}
    return {
        "rope_theta": float(scaling["rope_theta"]),
        "rope_fraction": float(scaling["partial_rotary_factor"]),
        "rope_scaling": rope_scaling(scaling, config),
    }


def rope_scaling(scaling: Config, config: Config) -> dict[str, Any] | None:
    """Options of `effattn_jax.layers.rope_scaling.RopeScaling`; None for plain angles."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    longest = config.get("max_position_embeddings", 0)
    original = scaling.get("original_max_position_embeddings") or longest
    if kind in ("default", None):
        return None
    if kind == "linear":
        return {"kind": "linear", "factor": float(scaling["factor"])}
    if kind == "llama3":
        names = {"low_frequency": "low_freq_factor", "high_frequency": "high_freq_factor", "factor": "factor"}
        return {"kind": kind, "original_length": original} | {ours: float(scaling[n]) for ours, n in names.items()}
    if kind == "yarn":
        factor = float(scaling["factor"])
        return {
            "kind": kind,
            "factor": factor,
            "original_length": original,
            "fast": float(scaling.get("beta_fast") or 32),
            "slow": float(scaling.get("beta_slow") or 1),
            "truncate": bool(scaling.get("truncate", True)),
            "attention_factor": _yarn_attention_factor(scaling, factor),
        }
    if kind in ("longrope", "su"):
        long = longest > original
        factor = scaling.get("factor") or longest / original
        stretch = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return {
            "kind": "factors",
            "factors": tuple(scaling["long_factor" if long else "short_factor"]),
            "attention_factor": float(scaling.get("attention_factor") or stretch),
        }
    checks.fail("rope_type", repr(kind), "default, linear, llama3, yarn or longrope")


def _yarn_attention_factor(scaling: Config, factor: float) -> float | None:
    """DeepSeek divides two of YaRN's factors; None is YaRN's own."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        of = lambda scale: 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0  # noqa: E731
        return of(scaling["mscale"]) / of(scaling["mscale_all_dim"])
    return None
