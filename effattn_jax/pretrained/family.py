"""What a family of published models is: how its config becomes options of our model, and its tensors our parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from effattn_jax.pretrained.entry import Entry

Config = Mapping[str, Any]  # config.json as it is


def nothing(config: Config) -> Sequence[str]:
    return ()


def no_constants(config: Config) -> Mapping[str, np.ndarray]:
    return {}


class Family(NamedTuple):
    """Args:
    model_types: values of `model_type` in config.json.
    blocks: the name of each block, in order; a name stands for options under `mixers` of `options`.
    options: of `LanguageModel`, but for the pattern.
    outside: the tensors that belong to no block.
    inside: the tensors of block i; parameters are named below the block.
    ignored: regular expressions of tensors that hold nothing to load.
    constants: tensors that follow from the config; ignored when loading, written when saving.
    """

    model_types: tuple[str, ...]
    blocks: Callable[[Config], Sequence[str]]
    options: Callable[[Config], dict[str, Any]]
    outside: Callable[[Config], Sequence[Entry]]
    inside: Callable[[Config, int], Sequence[Entry]]
    ignored: Callable[[Config], Sequence[str]] = nothing
    constants: Callable[[Config], Mapping[str, np.ndarray]] = no_constants
