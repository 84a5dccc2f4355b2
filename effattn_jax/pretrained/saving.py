"""A model written back as its authors publish theirs."""

import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from effattn_jax import checks
from effattn_jax.models.blueprint import blueprint, parameters_of
from effattn_jax.models.language_model import LanguageModel
from effattn_jax.pretrained.build import family_of
from effattn_jax.pretrained.loading import is_matrix
from effattn_jax.pretrained.rules import Rule, rules
from effattn_jax.pretrained.safetensors_reader import INDEX, SINGLE

CONFIG = "config.json"
METADATA = {"format": "pt"}  # transformers wants to be told


def save(model: LanguageModel, path: str | os.PathLike[str], *, shard_bytes: int = 2 << 30) -> None:
    """Writes config.json and safetensors under the names that the family's authors use.

    What `load` read and nobody changed comes back bit for bit. Files larger than `shard_bytes` are split. A config that
    names a dtype then names that of the matrices, since transformers rounds what it reads to it.

    Args:
      model: from `load` or `from_config`: it knows its config.
      path: a directory, made where it is not there.

    Raises:
      ValueError: the model has no published config; the directory holds a checkpoint already.
    """
    if model.source is None:
        checks.fail("model", "one with no published config", "one from load or from_config")
    directory = pathlib.Path(path)
    present = [name for name in (CONFIG, SINGLE, INDEX) if (directory / name).exists()]
    if present:
        checks.fail("path", f"{directory} with {', '.join(present)} in it", "an empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    config, parameters = model.source.config, parameters_of(model)
    shards = _shards(rules(config, blueprint(lambda: model)), parameters, shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    constants = dict(family_of(config).constants(config))
    total = 0
    for name, shard in zip(names, shards, strict=True):
        tensors = {tensor: _tensor(rule, parameters) for tensor, rule in shard.items()}
        if name == names[-1]:
            tensors |= constants
        total += sum(x.nbytes for x in tensors.values())
        save_file(tensors, directory / name, metadata=METADATA)
    if len(shards) > 1:
        places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        places |= dict.fromkeys(constants, names[-1])
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (directory / CONFIG).write_text(json.dumps(_named(config, parameters), indent=2) + "\n")


def _named(config: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """The config with the dtype of the matrices, the widest, in place of the one it names."""
    dtype = functools.reduce(jnp.promote_types, [x.dtype for name, x in parameters.items() if is_matrix(name)])
    return {key: str(dtype) if key in ("dtype", "torch_dtype") else value for key, value in config.items()}


def _shards(wanted: dict[str, Rule], parameters: dict[str, Any], limit: int) -> list[dict[str, Rule]]:
    """The tensors in order, cut where a file would grow beyond the limit."""
    shards: list[dict[str, Rule]] = [{}]
    size = 0
    for name, rule in wanted.items():
        nbytes = sum(
            int(np.prod(s)) * parameters[p].dtype.itemsize for p, s in zip(rule.parameters, rule.shapes, strict=True)
        )
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = rule
        size += nbytes
    return shards


def _tensor(rule: Rule, parameters: dict[str, Any]) -> np.ndarray:
    pieces = [
        np.asarray(jax.device_get(parameters[name][rule.at] if rule.at else parameters[name]))
        for name in rule.parameters
    ]
    return np.ascontiguousarray(rule.layout.join(pieces))
