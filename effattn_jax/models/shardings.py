"""The one table from logical names of a parameter's axes to the axes of a mesh."""

from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effattn_jax.models.blueprint import Blueprint

RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor", "experts": "tensor"}


def parameter_shardings(blueprint: Blueprint[Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """By the logical names of each axis; an axis that its mesh axis does not divide stays whole.

    A mesh axis cuts one axis of a parameter, the first that asks for it.
    """
    return {
        parameter: NamedSharding(mesh, _spec(axes, blueprint.shapes[parameter].shape, mesh))
        for parameter, axes in blueprint.axes.items()
    }


def _spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    found: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        axis = RULES.get(name) if name is not None else None
        fits = axis is not None and axis in mesh.shape and axis not in found and size % mesh.shape[axis] == 0
        found.append(axis if fits else None)
    return PartitionSpec(*found)
