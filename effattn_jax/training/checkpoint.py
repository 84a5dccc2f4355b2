"""Checkpoints of a training run: asynchronous, kept a few at a time, checked before they are trusted."""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol, Self

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from effattn_jax.checks import fail
from effattn_jax.training.integrity import write_checksums
from effattn_jax.training.restore import (
    DATA,
    CheckpointError,
    MismatchError,
    check_matches,
    finished_steps,
    newest_sound,
    one_line,
    quiet_orbax,
    read_item,
)

_UNFINISHED = ".orbax-checkpoint-tmp"


class SaveError(CheckpointError):
    """A checkpoint could not be written (most often: the disk is full)."""


class DataIterator(Protocol):
    """What is asked of a data iterator: its position as UTF-8 bytes. Each process saves its own."""

    def get_state(self) -> bytes: ...
    def set_state(self, state: bytes) -> None: ...


class Checkpoints:
    """Saves and restores a training state: a dict from part (`params`, `optimizer`, ...) to a pytree of jax.Arrays.

    Every process calls every method, at the same steps. With more than one process each array must be global: a step
    counter or a loss average that one process made for itself is put on all devices with a replicated sharding first.

    Args:
      directory: created if absent.
      keep: how many of the newest checkpoints stay.
      keep_period: steps that are multiples of it stay for ever.
      report: receives one line when a damaged or unfinished checkpoint is passed over.
    """

    def __init__(
        self, directory: str, *, keep: int = 3, keep_period: int | None = None, report: Callable[[str], None] = print
    ) -> None:
        if keep < 1:
            fail("keep", keep, "at least 1")
        if keep_period is not None and keep_period < 1:
            fail("keep_period", keep_period, "at least 1, or None")
        quiet_orbax()
        self._directory, self._report = epath.Path(directory).resolve(), report
        self._saving: int | None = None  # the step on its way to disk
        self._failure: SaveError | None = None
        self._unfinished = self._unfinished_steps()
        kept: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if keep_period is not None:
            kept.append(policies.EveryNSteps(keep_period))
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._before_commit),
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # a damaged step must not stop the run from starting
            ),
        )

    def save(
        self, step: int, state: Mapping[str, Any], data_iterator: DataIterator | None = None, *, wait: bool = False
    ) -> None:
        """Copies the state off the devices and returns; writing goes on in the background unless `wait`.

        Raises:
          SaveError: this save, or the one before it, failed. Names the last good checkpoint; the run should end.
          ValueError: there is a checkpoint of that step already, or a part has the name of the iterator's.
        """
        self.wait()
        if DATA in state:
            fail("state", f"a part named {DATA!r}", "another name: that one is the data iterator's")
        if step in finished_steps(self._directory):
            fail("step", step, f"a step without a checkpoint in {self._directory}")
        parts: dict[str, ocp.args.CheckpointArgs] = {name: ocp.args.StandardSave(part) for name, part in state.items()}
        if data_iterator is not None:
            parts[DATA] = grain.checkpoint.CheckpointSave(data_iterator)
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**parts), force=True)
        except Exception as error:
            if _system_reason(error) is None:  # a state that cannot be saved at all, not a failing disk
                raise
            self._fail(error)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Blocks until what was saved is on disk. Raises SaveError as `save` does."""
        if self._failure:
            raise self._failure
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._fail(error)
        self._saving = None

    def restore_latest(
        self, abstract_state: Mapping[str, Any], data_iterator: DataIterator | None = None
    ) -> tuple[int, dict[str, Any]] | None:
        """Reads the newest sound checkpoint and moves the data iterator to its place; None if there never was one.

        Unfinished and damaged checkpoints are passed over with one line to `report`. Damaged ones are renamed to
        `damaged-<step>`, out of the way of the run, which will save that step again.

        Args:
          abstract_state: pytrees of jax.ShapeDtypeStruct with shardings, which may differ from those saved.

        Raises:
          CheckpointError: there are checkpoints, but none can be read.
          MismatchError: the checkpoint is of another model, or of another number of processes.
        """
        self.wait()
        steps = finished_steps(self._directory)
        step, damaged = newest_sound(self._directory, steps) if steps else (None, {})
        instead = "starting from the beginning" if step is None else f"resuming from step {step}"
        for bad in sorted(bad for bad in self._unfinished if bad > (step or 0)):
            self._report(f"checkpoint of step {bad} is unfinished: the run ended while it was written; {instead}")
        for bad, reason in damaged.items():
            self._report(f"checkpoint of step {bad} cannot be used: {reason}; {instead}")
        self._unfinished = []
        if step is None:
            return None
        path = self._directory / str(step)
        for name in sorted(abstract_state, key=lambda name: name != "params"):  # the model's own names come first
            check_matches(path / name, abstract_state[name])
        state = {name: read_item(path / name, part) for name, part in abstract_state.items()}
        if data_iterator is not None:
            data_iterator.set_state(_iterator_state(path / DATA))
        self._set_aside(list(damaged))
        return step, state

    def latest_step(self) -> int | None:
        """The newest step that is completely written; None if there is none."""
        return max(finished_steps(self._directory), default=None)

    def close(self) -> None:
        """Waits as `wait` does, unless a failure was raised already."""
        if self._failure is None:
            self.wait()
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fail(self, error: BaseException) -> NoReturn:
        good = [step for step in finished_steps(self._directory) if step != self._saving]
        last = f"the last good one is step {good[-1]}" if good else "there is none before it"
        self._failure = SaveError(
            f"checkpoint of step {self._saving} was not written to {self._directory}: "
            f"{_system_reason(error) or one_line(error)}; {last}"
        )
        raise self._failure from error

    def _before_commit(self) -> None:
        for path in self._directory.glob(f"{self._saving}{_UNFINISHED}*"):
            write_checksums(path)

    def _unfinished_steps(self) -> list[int]:
        if not self._directory.is_dir():
            return []
        heads = [path.name.partition(_UNFINISHED)[0] for path in self._directory.glob(f"*{_UNFINISHED}*")]
        return [int(head) for head in heads if head.isdigit()]

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                target = self._directory / f"damaged-{step}"
                if target.exists():
                    target.rmtree()
                (self._directory / str(step)).rename(target)
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._manager.reload()


def _system_reason(error: BaseException) -> str | None:
    """What the operating system said, e.g. "No space left on device"; TensorStore only quotes its number."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else None


def _iterator_state(path: epath.Path) -> bytes:
    mine = path / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    if not mine.exists():
        found = ", ".join(sorted(file.name for file in path.glob("process_*"))) if path.is_dir() else "none"
        raise MismatchError(f"data iterator: {path} has states {found}; this run needs {mine.name}")
    return mine.read_bytes()
