"""Reading a checkpoint: which steps there are, whether one is sound, whether it fits the model, and its arrays.

A checkpoint is a directory `<root>/<step>` with a subdirectory per item (`params`, `optimizer`, ..., `data`), so that
each part can be read alone. Only damage to its files disqualifies a checkpoint: an intact one that does not fit the
model, the devices or their memory is an error, never a reason to resume from an older one.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax.experimental import multihost_utils

from effattn_jax.training.integrity import CorruptError, verify_checksums

DATA = "data"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message is one line."""


class MismatchError(CheckpointError):
    """A sound checkpoint of another model: names, shapes or dtypes differ."""


def quiet_orbax() -> None:
    """Keeps Orbax's log off the terminal, and the echoes of a failed write; what fails still raises."""
    logger = absl_logging.get_absl_logger()
    if _not_from_orbax not in logger.filters:
        logger.addFilter(_not_from_orbax)
    if not isinstance(sys.unraisablehook, _DropLateWrites):
        sys.unraisablehook = _DropLateWrites(sys.unraisablehook)


def _not_from_orbax(record: Any) -> bool:
    return "/orbax/checkpoint/" not in record.pathname


class _DropLateWrites:
    """After one write has failed, others that end later find Orbax's event loop closed: a traceback for each."""

    def __init__(self, former: Callable[[Any], Any]) -> None:
        self._former = former

    def __call__(self, event: Any) -> None:
        if not (isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == "Event loop is closed"):
            self._former(event)


def finished_steps(directory: epath.Path) -> list[int]:
    """Committed steps, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def one_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an error, short enough for a terminal."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if len(line) <= limit else line[: limit - 3] + "..."


def newest_sound(directory: epath.Path, steps: Sequence[int], item: str | None = None) -> tuple[int, dict[int, str]]:
    """The newest of `steps` whose files are intact, and the reasons against the newer ones.

    All processes call it together: they divide the files, and one objection is everyone's.
    """
    damaged: dict[int, str] = {}
    for step in sorted(steps, reverse=True):
        reason = ""
        try:
            verify_checksums(directory / str(step), jax.process_index(), jax.process_count(), item)
        except (CorruptError, OSError) as error:
            reason = one_line(error)
        if np.all(multihost_utils.process_allgather(np.array(not reason))):
            return step, damaged
        damaged[step] = reason or "another process found it damaged"
    each = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    raise CheckpointError(f"{directory}: no readable checkpoint" + (f" ({each})" if each else ""))


def _spell(array: Any) -> str:
    return "absent" if array is None else f"{array.dtype}{list(array.shape)}"


def check_matches(path: epath.Path, abstract: Any, *, dtypes: bool = True) -> None:
    """Raises MismatchError at the first array of the item at `path` that differs from `abstract`."""
    if not path.is_dir():
        items = ", ".join(sorted(part.name for part in path.parent.iterdir() if part.is_dir()))
        raise MismatchError(f"{path.name}: absent in the checkpoint {path.parent}, which has {items}")
    metadata = ocp.StandardCheckpointHandler().metadata(path)
    stored = {array.name: array for array in jax.tree.leaves(metadata.tree)}
    wanted = ocp.tree.to_flat_dict(abstract, sep=".")
    for name in [*wanted, *(name for name in stored if name not in wanted)]:
        have, want = stored.get(name), wanted.get(name)
        same = have is not None and want is not None and tuple(have.shape) == tuple(want.shape)
        if not same or (dtypes and _spell(have) != _spell(want)):
            raise MismatchError(
                f"{path.name} {name}: {_spell(have)} in the checkpoint {path.parent}, {_spell(want)} in the model"
            )


def read_item(path: epath.Path, abstract: Any) -> Any:
    """The arrays of one item with the shapes, dtypes and shardings of `abstract`."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or here), abstract)
    return ocp.StandardCheckpointHandler().restore(path, args=ocp.args.StandardRestore(placed))


def restore_params(
    directory: str,
    abstract_params: Any,
    *,
    step: int | None = None,
    item: str = "params",
    report: Callable[[str], None] = print,
) -> tuple[int, Any]:
    """Reads one item, by default the model's parameters, without the optimiser: for generation and evaluation.

    Args:
      directory: where `Checkpoints` wrote.
      abstract_params: pytree of jax.ShapeDtypeStruct. The shapes must be those stored; arrays are cast to the dtypes.
        A leaf without a sharding goes to the first device.
      step: which step; the newest sound one if None.
      item: the name of the part.
      report: receives one line for each damaged step that was passed over.

    Returns:
      (step, params).

    Raises:
      CheckpointError: there is no such step, or none that can be read.
      MismatchError: the checkpoint is of another model.
    """
    quiet_orbax()
    root = epath.Path(directory).resolve()
    steps = finished_steps(root)
    if step is not None and step not in steps:
        raise CheckpointError(f"{root}: no checkpoint of step {step}; there are {steps}")
    chosen, damaged = newest_sound(root, steps if step is None else [step], item)
    for bad, reason in damaged.items():
        report(f"checkpoint of step {bad} cannot be used: {reason}; using step {chosen}")
    path = root / str(chosen) / item
    check_matches(path, abstract_params, dtypes=False)
    return chosen, read_item(path, abstract_params)
