"""What tensors say of a model where its config.json does not, or where there is none."""

from collections.abc import Mapping

from effattn_jax import checks
from effattn_jax.pretrained.build import family_of
from effattn_jax.pretrained.families import FAMILIES
from effattn_jax.pretrained.family import Config
from effattn_jax.pretrained.tensors import TensorInfo


def recognised(tensors: Mapping[str, TensorInfo]) -> Config:
    """The config of a checkpoint that is nothing but tensors.

    Raises:
      ValueError: no family has such tensors.
    """
    marked = {kind: family for kind, family in FAMILIES.items() if family.marks}
    for family in marked.values():
        if set(family.marks) <= set(tensors):
            return family.sizes(tensors)
    some = ", ".join(sorted(tensors)[:5])
    checks.fail("tensors", f"{some}, ...", f"those of {', '.join(sorted(marked))}, or a config.json")


def completed(config: Config, tensors: Mapping[str, TensorInfo]) -> Config:
    """The config with what it lacks."""
    return {**family_of(config).sizes(tensors), **config}
