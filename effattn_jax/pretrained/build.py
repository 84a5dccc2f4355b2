"""From a published config to a model with random weights."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.models.language_model import LanguageModel
from effattn_jax.models.pattern import Pattern, repeated_pattern
from effattn_jax.pretrained.families import FAMILIES
from effattn_jax.pretrained.family import Config, Family
from effattn_jax.pretrained.plain import language_config
from effattn_jax.pretrained.source import Source

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16, None: jnp.float32}


def kind_of(config: Config) -> str:
    """`model_type`; RWKV's authors give a version instead, here "RWKV-7", and others only fields of their own."""
    if "model_type" in config:
        return str(config["model_type"])
    if "version" in config:
        return f"RWKV-{config['version']}"
    told = (kind for kind, family in FAMILIES.items() if family.fields and set(family.fields) <= set(config))
    return next(told, "None")


def family_of(config: Config) -> Family:
    kind = kind_of(config)
    if kind not in FAMILIES:
        checks.fail("model_type", repr(kind), f"one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def pattern_of(config: Config) -> Pattern:
    return repeated_pattern(family_of(config).blocks(config))


def stored_dtype(config: Config) -> Any:
    """The dtype that the config names for its weights."""
    name = config.get("dtype", config.get("torch_dtype"))
    if name not in DTYPES:
        checks.fail("dtype", repr(name), "float32, bfloat16 or float16 in config.json")
    return DTYPES[name]


def language_model_options(config: Config) -> dict[str, Any]:
    """Of `LanguageModel`, but for its dtype."""
    split = pattern_of(config)
    pattern = {"before": split.before, "pattern": split.pattern, "repeats": split.repeats, "after": split.after}
    return family_of(config).options(config) | pattern


def from_config(config: Config, *, dtype: Any = None, remat: bool = False, rngs: nnx.Rngs) -> LanguageModel:
    """The model that a published config.json describes, with weights as we draw them.

    Args:
      config: config.json, as a dictionary.
      dtype: of computation; None is the one that the config names. Parameters are float32.
      remat: see `LanguageModel`.

    Raises:
      ValueError: a `model_type` or an option that is not supported.
    """
    config = language_config(config)
    options = language_model_options(config)
    dtype = stored_dtype(config) if dtype is None else dtype
    model = LanguageModel(**options, dtype=dtype, remat=remat, rngs=rngs)
    model.source = Source.of(config)
    return model
