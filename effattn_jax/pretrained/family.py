"""What a family of published models is: how its config becomes options of our model, and its tensors our parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from effattn_jax.pretrained.entry import Entry
from effattn_jax.pretrained.tensors import TensorInfo

Config = Mapping[str, Any]  # config.json as it is


def nothing(config: Config) -> Sequence[str]:
    return ()


def no_constants(config: Config) -> Mapping[str, np.ndarray]:
    return {}


def all_used(config: Config, block: int) -> Sequence[str]:
    return ()


def no_sizes(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    return {}


class Family(NamedTuple):
    """Args:
    model_types: values of `model_type` in config.json, or "RWKV-7" for `version` 7 without one; of `fields` our name.
    blocks: the name of each block, in order; a name stands for options under `mixers` of `options`.
    options: of `LanguageModel`, but for the pattern.
    outside: the tensors that belong to no block.
    inside: the tensors of block i; parameters are named below the block.
    ignored: regular expressions of tensors that hold nothing to load.
    constants: tensors that follow from the config; ignored when loading, written when saving.
    unused: parameters of block i without effect there, named below it: no tensor fills them, and they are zeros.
    sizes: what a config may lack, from the tensors.
    marks: names of tensors that tell the family where there is no config.json.
    fields: names in config.json that tell the family where there is no `model_type`.
    """

    model_types: tuple[str, ...]
    blocks: Callable[[Config], Sequence[str]]
    options: Callable[[Config], dict[str, Any]]
    outside: Callable[[Config], Sequence[Entry]]
    inside: Callable[[Config, int], Sequence[Entry]]
    ignored: Callable[[Config], Sequence[str]] = nothing
    constants: Callable[[Config], Mapping[str, np.ndarray]] = no_constants
    unused: Callable[[Config, int], Sequence[str]] = all_used
    sizes: Callable[[Mapping[str, TensorInfo]], dict[str, Any]] = no_sizes
    marks: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
