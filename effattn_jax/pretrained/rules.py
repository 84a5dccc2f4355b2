"""A family's table, resolved for a model: for every tensor of the file the parameters and the place in each."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from effattn_jax import checks
from effattn_jax.models.blueprint import Blueprint
from effattn_jax.pretrained.build import family_of, kind_of, pattern_of
from effattn_jax.pretrained.coverage import check_coverage
from effattn_jax.pretrained.entry import Entry
from effattn_jax.pretrained.family import Config
from effattn_jax.pretrained.layout import Layout, Shape


class Rule(NamedTuple):
    """Args:
    parameters: their names in the model.
    at: index on the leading axes of each of them.
    shapes: what lies in the tensor: the parameters at that index.
    shape: of the tensor.
    """

    parameters: tuple[str, ...]
    at: tuple[int, ...]
    layout: Layout
    shapes: tuple[Shape, ...]
    shape: Shape


def rules(config: Config, plan: Blueprint[Any]) -> dict[str, Rule]:
    """By the names of tensors.

    Raises:
      ValueError: parameters that the table names no tensor for, see `check_coverage`.
    """
    family, split = family_of(config), pattern_of(config)
    found: dict[str, Rule] = {}
    named: dict[str, list[tuple[int, ...]]] = {}

    def name_all(names: Sequence[str], at: tuple[int, ...], by: str) -> None:
        unknown = [name for name in names if name not in plan.shapes]
        if unknown:
            raise KeyError(f"{by}: no parameters {unknown} among {sorted(plan.shapes)}")
        for name in names:
            named.setdefault(name, []).append(at)

    def add(entries: Sequence[Entry], below: str, index: tuple[int, ...]) -> None:
        for entry in entries:
            names, at = tuple(below + name for name in entry.parameters), index + entry.at
            name_all(names, at, entry.tensor)
            shapes = tuple(plan.shapes[name].shape[len(at) :] for name in names)
            found[entry.tensor] = Rule(names, at, entry.layout, shapes, entry.layout.shape(shapes))

    add(family.outside(config), "", ())
    for block in range(len(family.blocks(config))):
        below, index = split.place(block)
        add(family.inside(config, block), f"{below}.", index)
        name_all([f"{below}.{name}" for name in family.unused(config, block)], index, "unused")
    check_coverage(kind_of(config), plan, named)
    return found


def check_tensors(config: Config, wanted: Mapping[str, Rule], shapes: Mapping[str, Shape]) -> None:
    """All that does not fit in one error.

    Raises:
      ValueError: tensors are missing, unknown or of another shape.
    """
    family = family_of(config)
    ignored = [re.compile(pattern) for pattern in (*family.ignored(config), *map(re.escape, family.constants(config)))]
    unknown = [n for n in shapes if n not in wanted and not any(pattern.fullmatch(n) for pattern in ignored)]
    missing = [name for name in wanted if name not in shapes]
    misshapen = [
        f"{name} {shapes[name]} not {rule.shape}"
        for name, rule in wanted.items()
        if name in shapes and shapes[name] != rule.shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(sorted(names))}"
        for kind, names in (("missing", missing), ("unknown", unknown), ("misshapen", misshapen))
        if names
    ]
    if problems:
        checks.fail("tensors", "; ".join(problems), f"those of model_type {kind_of(config)!r}")
