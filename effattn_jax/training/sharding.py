"""Which device holds what: a mesh of `data`, `fsdp` and `tensor` axes; `models.shardings` has the parameters' table.

data    copies of the parameters, other rows of the batch
fsdp    other rows of the batch too, and the parameters cut along the residual stream
tensor  the same rows, parameters cut along heads, hidden channels and vocabulary
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from effattn_jax import checks
from effattn_jax.models.activations import BATCH_AXES

AXES = ("data", "fsdp", "tensor")


def make_mesh(sizes: Mapping[str, int], devices: Any = None) -> Mesh:
    """A mesh of the given sizes; one of them may be -1: what the others leave of the devices."""
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in AXES]
    known = int(np.prod([size for size in shape if size != -1]))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        checks.fail("mesh", dict(sizes), "positive sizes, at most one of them -1 (the rest)")
    if shape.count(-1) == 1 and len(devices) % known == 0:
        shape = [len(devices) // known if size == -1 else size for size in shape]
    if int(np.prod(shape)) != len(devices):
        checks.fail("mesh", dict(sizes), f"a product of {len(devices)}, the number of devices")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def shardings_like(tree: Any, parameters: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Shardings of a tree that holds dictionaries of parameters (moments of an optimiser): theirs; else replicated."""
    is_parameters = lambda x: isinstance(x, dict) and x.keys() == parameters.keys()  # noqa: E731
    return jax.tree.map(
        lambda x: dict(parameters) if is_parameters(x) else replicated(mesh), tree, is_leaf=is_parameters
    )


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The rows of this process as its part of arrays over all processes."""
    return {name: jax.make_array_from_process_local_data(batch_sharding(mesh), x) for name, x in batch.items()}
