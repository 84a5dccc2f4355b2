"""A model taken apart: its parameters as one flat dictionary, and all the rest of it.

Training, sharding and checkpoints work on `{"units.blocks.0.mixer.A_log": array, ...}`: names that a person can read,
and a pytree with nothing of Flax in it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from effattn_jax.layers.buffer import Buffer
from effattn_jax.typing import Array

Parameters = dict[str, Array]


class Blueprint[Model: nnx.Module](NamedTuple):
    """A model without its parameters; `axes` are the logical names of each parameter's axes, None for a stacked one.
    `buffers` names those that are constants: nothing may train them."""

    graph: nnx.GraphDef[Model]
    structure: Any
    names: tuple[str, ...]
    shapes: dict[str, jax.ShapeDtypeStruct]
    axes: dict[str, tuple[str | None, ...]]
    buffers: frozenset[str]

    def model(self, parameters: Mapping[str, Array]) -> Model:
        """The model with these parameters; usable inside a traced function."""
        leaves = [parameters[name] for name in self.names]
        return nnx.merge(self.graph, jax.tree.unflatten(self.structure, leaves))


def blueprint[Model: nnx.Module](make: Callable[[], Model]) -> Blueprint[Model]:
    """From a function that builds the model; nothing is computed or allocated."""
    graph, state = nnx.split(nnx.eval_shape(make))
    variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    leaves, structure = jax.tree.flatten(state)
    shapes = dict(zip(variables, leaves, strict=True))
    axes = {}
    for name, variable in variables.items():
        named = variable.get_metadata()["axes"]
        axes[name] = (None,) * (shapes[name].ndim - len(named)) + tuple(named)
    buffers = frozenset(name for name, variable in variables.items() if isinstance(variable, Buffer))
    return Blueprint(graph, structure, tuple(variables), shapes, axes, buffers)


def parameters_of(model: nnx.Module) -> Parameters:
    """The parameters under their names."""
    return {
        ".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
