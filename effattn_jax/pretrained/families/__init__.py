"""The families of published models, a file each, by the `model_type` of their config.json."""

from effattn_jax.pretrained.families import (
    gemma3,
    gpt_oss,
    jamba,
    kimi_linear,
    mamba,
    mamba2,
    minicpm,
    minimax,
    mistral,
    qwen3_next,
    recurrent_gemma,
    rwkv5,
    rwkv6,
    rwkv7,
    ttt,
)
from effattn_jax.pretrained.family import Family

MODULES = (
    gemma3,
    gpt_oss,
    jamba,
    kimi_linear,
    mamba,
    mamba2,
    minicpm,
    minimax,
    mistral,
    qwen3_next,
    recurrent_gemma,
    rwkv5,
    rwkv6,
    rwkv7,
    ttt,
)
FAMILIES: dict[str, Family] = {kind: module.FAMILY for module in MODULES for kind in module.FAMILY.model_types}
