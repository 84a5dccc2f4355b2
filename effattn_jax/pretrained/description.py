"""A published model described by its config alone: no weights are read."""

import math
import os
from collections.abc import Sequence

from flax import nnx

from effattn_jax.models.blueprint import blueprint
from effattn_jax.models.description import Description, describe
from effattn_jax.pretrained.build import from_config
from effattn_jax.pretrained.family import Config
from effattn_jax.pretrained.hub import PTH, directory_of, file_of
from effattn_jax.pretrained.loading import CONFIG, read_config
from effattn_jax.pretrained.plain import language_config
from effattn_jax.pretrained.pth_reader import PthReader
from effattn_jax.pretrained.recognition import completed, recognised
from effattn_jax.pretrained.rules import rules


def published_config(path_or_repo: str | os.PathLike[str]) -> Config:
    """config.json of a directory or of a repository of the hub; of a `.pth` file what its tensors tell.

    Raises:
      ValueError: there is none; a name that the hub cannot be asked for.
    """
    if os.fspath(path_or_repo).endswith(PTH):
        tensors = PthReader(file_of(path_or_repo)).tensors
        return completed(recognised(tensors), tensors)
    return read_config(directory_of(path_or_repo, (CONFIG,)))


def describe_config(config: Config, contexts: Sequence[int]) -> Description:
    """`describe` for a config; parameters are the numbers in the tensors of the published files.

    Raises:
      ValueError: a `model_type` or an option that is not supported.
    """
    config = language_config(config)
    plan = blueprint(lambda: from_config(config, rngs=nnx.Rngs(0)))
    found = describe(plan, contexts)
    return found._replace(parameters=sum(math.prod(rule.shape) for rule in rules(config, plan).values()))
