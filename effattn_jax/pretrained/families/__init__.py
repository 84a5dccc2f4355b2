"""The families of published models, a file each, by the `model_type` of their config.json."""

from effattn_jax.pretrained.families import mamba, mistral
from effattn_jax.pretrained.family import Family

FAMILIES: dict[str, Family] = {kind: module.FAMILY for module in (mamba, mistral) for kind in module.FAMILY.model_types}
