"""Whether a family's table accounts for all of a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effattn_jax import checks
from effattn_jax.models.blueprint import Blueprint

Index = tuple[int, ...]


def check_coverage(kind: str, plan: Blueprint[Any], named: Mapping[str, Sequence[Index]]) -> None:
    """Every parameter has an entry, and of a stacked one every index; buffers need none.

    Args:
      kind: of the model, for the message.
      named: by parameter, the indices on its leading axes that entries fill or that the family calls unused.

    Raises:
      ValueError: with all that is left over.
    """
    wanted = [name for name in plan.names if name not in plan.buffers]
    left = [place for name in wanted for place in _left(name, plan.shapes[name].shape, named.get(name, ()))]
    if left:
        checks.fail(f"the table of {kind!r}", f"no tensor for {', '.join(left)}", "one for every parameter")


def _left(name: str, shape: tuple[int, ...], indices: Sequence[Index]) -> list[str]:
    if not indices:
        return [name]
    filled = np.zeros(shape[: max(map(len, indices))], bool)
    for index in indices:
        filled[index] = True
    return [f"{name}{index}" for index in np.argwhere(~filled).tolist()]
