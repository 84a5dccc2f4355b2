"""A published checkpoint, tensor by tensor onto its devices."""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from effattn_jax import checks
from effattn_jax.layers.buffer import Buffer
from effattn_jax.models.blueprint import Blueprint, blueprint
from effattn_jax.models.language_model import LanguageModel
from effattn_jax.models.shardings import parameter_shardings
from effattn_jax.pretrained.build import from_config
from effattn_jax.pretrained.family import Config
from effattn_jax.pretrained.hub import PTH, directory_of, file_of
from effattn_jax.pretrained.plain import language_model
from effattn_jax.pretrained.pth_reader import PthReader
from effattn_jax.pretrained.recognition import completed, recognised
from effattn_jax.pretrained.rules import Rule, check_tensors, rules
from effattn_jax.pretrained.safetensors_reader import DTYPES, SafetensorsReader
from effattn_jax.pretrained.tensors import Tensors
from effattn_jax.typing import Array

CONFIG = "config.json"
NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def load(path_or_repo: str | os.PathLike[str], *, mesh: Mesh | None = None, dtype: Any = None) -> LanguageModel:
    """The model in a directory in Hugging Face's format, of a repository of its hub, or in a `.pth` file of RWKV.

    Tensors go one by one from the file to the devices, so the host never holds more than one of them. Vectors keep the
    dtype they have in the file.

    Args:
      path_or_repo: a directory with config.json and safetensors, "author/name", a file "x.pth", or
        "author/name/x.pth".
      mesh: with the axes "fsdp" and "tensor" parameters are cut as in training; None: all on the first device.
      dtype: of matrices and of computation; None: of matrices as in the file, of computation as in config.json.

    Raises:
      ValueError: a family that is not known; tensors that are missing, unknown or of the wrong shape or dtype (all of
        them in one message); a damaged file; a name that the hub cannot be asked for.
    """
    config, reader = language_model(*_open(path_or_repo))
    config = completed(config, reader.tensors)
    make = functools.partial(_model, config, dtype)
    plan = blueprint(make)
    wanted = rules(config, plan)
    check_tensors(config, wanted, {name: info.shape for name, info in reader.tensors.items()})
    stored = {name: reader.tensors[name].dtype for name in wanted}
    refused = {f"{name} {kind}" for name, kind in stored.items() if kind not in DTYPES}
    if refused:
        checks.fail("tensors", f"dtypes {', '.join(sorted(refused))}", f"one of {', '.join(sorted(DTYPES))}")
    dtypes: dict[str, Any] = {}
    for name, rule in wanted.items():  # where the repetitions of a stack differ, the wider
        for parameter in rule.parameters:
            kind = jnp.dtype(dtype if dtype is not None and is_matrix(parameter) else NUMPY[stored[name]])
            dtypes[parameter] = jnp.promote_types(kind, dtypes.get(parameter, kind))
    where = shardings(plan, mesh)
    parameters = _buffers(make, where) | place(plan, wanted, dtypes, reader.read(wanted), where)
    unused = {
        name: _zeros(plan.shapes[name].shape, jnp.float32, where[name]) for name in plan.names if name not in parameters
    }
    return plan.model(parameters | unused)


MATRICES = ("kernel", "embedding")


def is_matrix(parameter: str) -> bool:
    """Whether the parameter takes the dtype that is asked for; vectors, rates and gates keep that of the file."""
    return parameter.rsplit(".", 1)[-1] in MATRICES


def _open(path_or_repo: str | os.PathLike[str]) -> tuple[Config, Tensors]:
    if os.fspath(path_or_repo).endswith(PTH):
        reader = PthReader(file_of(path_or_repo))
        return recognised(reader.tensors), reader
    directory = directory_of(path_or_repo)
    return read_config(directory), SafetensorsReader(directory)


def _model(config: Config, dtype: Any) -> LanguageModel:
    return from_config(config, dtype=dtype, rngs=nnx.Rngs(0))


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """config.json.

    Raises:
      ValueError: it is not there, or no JSON object.
    """
    path = directory / CONFIG
    if not path.is_file():
        checks.fail("path", f"no {CONFIG} in {directory}", "a directory in Hugging Face's format")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        checks.fail(CONFIG, str(error), "JSON")
    if not isinstance(config, dict):
        checks.fail(CONFIG, type(config).__name__, "a JSON object")
    return config


def shardings(plan: Blueprint[Any], mesh: Mesh | None) -> dict[str, Any]:
    """Where each parameter lives."""
    if mesh is None:
        return dict.fromkeys(plan.names, SingleDeviceSharding(jax.devices()[0]))
    auto = (AxisType.Auto,) * len(mesh.axis_names)  # the compiler decides how activations are cut
    return dict(parameter_shardings(plan, Mesh(mesh.devices, mesh.axis_names, axis_types=auto)))


def place(
    plan: Blueprint[Any],
    wanted: dict[str, Rule],
    dtypes: dict[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    where: dict[str, Any],
) -> dict[str, Array]:
    """Parameters from tensors, a stacked one filled slice by slice where it lies."""
    parameters: dict[str, Array] = {}
    for name, tensor in tensors:
        rule = wanted[name]
        pieces = rule.layout.split(tensor, rule.shapes)
        del tensor
        for parameter, piece in zip(rule.parameters, pieces, strict=True):
            shape, dtype, sharding = plan.shapes[parameter].shape, dtypes[parameter], where[parameter]
            order = _memory_order(piece)
            piece = jax.device_put(piece.transpose(order), _of_piece(sharding, len(rule.at), order))
            if not rule.at:
                parameters[parameter] = jax.jit(_turned, static_argnums=(1, 2), out_shardings=sharding)(
                    piece, order, dtype
                )
            else:
                if parameter not in parameters:
                    parameters[parameter] = _zeros(shape, dtype, sharding)
                index = np.ravel_multi_index(rule.at, shape[: len(rule.at)])
                parameters[parameter] = _put(parameters[parameter], piece, index, order)
            parameters[parameter].block_until_ready()  # or the host would run ahead with tensors in its hands
        del pieces, piece
    return parameters


def _memory_order(x: np.ndarray) -> tuple[int, ...]:
    """The axes as they lie in memory: in this order an array goes out without a copy; devices turn it back."""
    return tuple(int(axis) for axis in np.argsort([-stride for stride in x.strides], kind="stable"))


def _turned(piece: Array, order: tuple[int, ...], dtype: Any) -> Array:
    return jnp.transpose(piece, [order.index(axis) for axis in range(len(order))]).astype(dtype)


def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.partial(jax.jit, static_argnums=(3,), donate_argnums=(0,))
def _put(stacked: Array, piece: Array, index: Array, order: tuple[int, ...]) -> Array:
    leading = stacked.shape[: stacked.ndim - piece.ndim]
    at = jnp.unravel_index(index, leading)
    piece = _turned(piece, order, stacked.dtype)
    return jax.lax.dynamic_update_slice(
        stacked, piece.reshape((1,) * len(leading) + piece.shape), (*at, *(0,) * piece.ndim)
    )


def _of_piece(sharding: Any, leading: int, order: tuple[int, ...]) -> Any:
    """Where a piece lies: as the whole, less the leading axes, the others in this order."""
    if isinstance(sharding, NamedSharding):
        spec = (*sharding.spec, *(None,) * (leading + len(order) - len(sharding.spec)))[leading:]
        return NamedSharding(sharding.mesh, PartitionSpec(*(spec[axis] for axis in order)))
    return sharding


def _buffers(make: Callable[[], LanguageModel], where: dict[str, Any]) -> dict[str, Array]:
    """What layers compute for themselves; no file has it."""
    paths = lambda model: nnx.to_flat_state(nnx.state(model, Buffer))  # noqa: E731
    names = [".".join(map(str, path)) for path, _ in paths(nnx.eval_shape(make))]
    if not names:
        return {}
    out = [where[name] for name in names]
    values = jax.jit(lambda: [variable[...] for _, variable in paths(make())], out_shardings=out)()
    return dict(zip(names, values, strict=True))
