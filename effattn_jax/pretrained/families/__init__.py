"""The families of published models, a file each, by the `model_type` of their config.json."""

from effattn_jax.pretrained.families import (
    gemma3,
    gpt_oss,
    jamba,
    mamba,
    mamba2,
    minicpm,
    minimax,
    mistral,
)
from effattn_jax.pretrained.family import Family

MODULES = (
    gemma3,
    gpt_oss,
    jamba,
    mamba,
    mamba2,
    minicpm,
    minimax,
    mistral,
)
FAMILIES: dict[str, Family] = {kind: module.FAMILY for module in MODULES for kind in module.FAMILY.model_types}
