"""Where activations live on a mesh."""

import jax
from jax.sharding import AxisType, PartitionSpec

from effattn_jax.typing import Array

BATCH_AXES = ("data", "fsdp")


def shard_batch(x: Array) -> Array:
    """Rows over the data axes of the mesh in context, everything else whole; nothing outside a mesh or `shard_map`.

    Without the hint the partitioner may prefer to move activations where it should gather weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if name in BATCH_AXES and kind == AxisType.Auto
    )
    if not axes:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *(None,) * (x.ndim - 1)))
