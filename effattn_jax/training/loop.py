"""The training loop."""

import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from effattn_jax import checks
from effattn_jax.models.blueprint import Parameters
from effattn_jax.models.sizes import format_bytes, sizes, training_flops_per_token
from effattn_jax.training.checkpoint import Checkpoints
from effattn_jax.training.evaluation import Evaluation, evaluate, make_evaluation_step
from effattn_jax.training.hardware import peak_flops
from effattn_jax.training.journal import Journal, Workload
from effattn_jax.training.metrics import MetricWriter
from effattn_jax.training.optimizer import make_schedule
from effattn_jax.training.preflight import check_workdir, checkpoint_bytes
from effattn_jax.training.profile import ProfileWindow
from effattn_jax.training.progress import TrainProgress
from effattn_jax.training.setup import heldout_batches, make_setup, train_stream
from effattn_jax.training.sharding import global_batch
from effattn_jax.training.signals import StopSignal
from effattn_jax.training.step import Batch, TrainState


class Result(NamedTuple):
    step: int  # steps done
    stopped_by: str | None  # the signal that ended the run before its last step
    parameters: Parameters
    evaluation: Evaluation | None  # after the last step


def train(config: ConfigDict, workdir: str) -> Result:
    """Train as `config` says, from the newest checkpoint in `workdir`, else from the beginning.

    Writes checkpoints/, metrics.jsonl and config.json to `workdir`. The same call after a crash, a kill or a signal
    goes on from the newest checkpoint, with the losses that an uninterrupted run would have had.

    Raises:
      ValueError: a config that does not fit together, data that is not there, a directory that takes no files.
      NonFiniteLoss, SaveError, CheckpointError: as their names say.
    """
    setup = make_setup(config)
    _check_periods(config.train)
    abstract = jax.eval_shape(setup.make_state)
    check_workdir(workdir, (config.train.keep_checkpoints + 1) * checkpoint_bytes(abstract))
    stream = train_stream(config, setup.tokenizer)
    heldout = heldout_batches(config, setup.tokenizer)
    main = jax.process_index() == 0

    with ExitStack() as stack:
        enter = stack.enter_context
        enter(jax.set_mesh(setup.mesh))
        notes: list[str] = []
        checkpoints = enter(
            Checkpoints(os.path.join(workdir, "checkpoints"), keep=config.train.keep_checkpoints, report=notes.append)
        )
        placed = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, setup.shardings
        )
        restored = checkpoints.restore_latest(_parts(placed), stream)
        start, state = (0, setup.make_state()) if restored is None else (restored[0], _whole(restored[1]))
        metrics = enter(MetricWriter(workdir, config.train.tensorboard, active=main))
        metrics.resume(start or None)
        if main:
            _store_config(config, workdir, notes)
        progress = enter(TrainProgress(config.train.steps, start, active=main))
        stop = enter(StopSignal())
        directory = os.path.join(workdir, "profile")
        profile = enter(ProfileWindow(directory, config.train.profile_start, config.train.profile_steps, progress.log))
        model = setup.blueprint.model(setup.blueprint.shapes)  # type: ignore[arg-type]
        for note in [str(sizes(model, config.data.sequence_length)), *notes]:
            progress.log(note)
        if restored is not None:
            progress.log(f"resumed after step {start}")

        batch = global_batch(next(stream), setup.mesh)
        train_step = _compile(setup.train_step, state, batch, progress.log)
        evaluation_step = make_evaluation_step(setup.blueprint, setup.mesh)
        evaluation: Evaluation | None = None
        journal = Journal(
            metrics,
            progress,
            make_schedule(config.optimizer, config.train.steps),
            _workload(config, training_flops_per_token(model, config.data.sequence_length)),
            config.train.log_every,
        )

        def last_good() -> int | None:
            checkpoints.wait()  # one may be on its way to disk
            return checkpoints.latest_step()

        step, pending, stopped = start, None, False
        while step < config.train.steps and not stopped:
            profile.step(step, state.step)
            state, values = train_step(state, batch)
            step += 1
            if pending is not None:  # one step late, so that the device never waits for the host
                journal.step(*pending, last_good)
            pending = (step, values)
            last = step == config.train.steps
            stopped = not last and _agreed(stop.requested, step, config.train.log_every)
            saves = last or stopped or step % config.train.checkpoint_every == 0
            evaluates = last or step % config.train.eval_every == 0
            if saves or evaluates:
                journal.step(*pending, last_good)
                pending = None
                with journal.paused():
                    if evaluates:  # before saving: what a checkpoint stands for has then been written down
                        evaluation = evaluate(
                            evaluation_step, state.parameters, heldout, heldout.byte_count, setup.mesh
                        )
                        journal.evaluation(step, evaluation)
                    if saves:
                        checkpoints.save(step, _parts(state), stream)
            if not last and not stopped:
                batch = global_batch(next(stream), setup.mesh)
        checkpoints.wait()
        if start == config.train.steps:
            evaluation = evaluate(evaluation_step, state.parameters, heldout, heldout.byte_count, setup.mesh)
        return Result(step, stop.received if stopped else None, state.parameters, evaluation)


def _parts(state: TrainState) -> dict[str, Any]:
    """A checkpoint's parts: the parameters apart, so that they can be read alone."""
    return {"params": state.parameters, "optimizer": state.optimizer, "progress": {"step": state.step}}


def _whole(parts: dict[str, Any]) -> TrainState:
    return TrainState(parts["progress"]["step"], parts["params"], parts["optimizer"])


def _compile(
    step: Any, state: TrainState, batch: Batch, report: Callable[[str], None]
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """The step as a compiled program, with a line on how long that took and what it needs."""
    began = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    if memory is None:
        report(f"compiled the training step in {seconds:.1f} s")
        return compiled
    held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    needs = f"{format_bytes(held)} of state and batch and {format_bytes(temporary)} of temporaries"
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None and held + temporary > limit:
        checks.fail(
            "device memory",
            f"{format_bytes(limit)} for a step that takes {needs}",
            "model.remat=True, more train.microbatches, a smaller data.batch_size or more devices",
        )
    report(f"compiled the training step in {seconds:.1f} s; per device it takes {needs}")
    return compiled


def _workload(config: ConfigDict, flops_per_token: float) -> Workload:
    tokens = config.data.batch_size * config.data.sequence_length
    peak = peak_flops(jax.devices()[0])
    return Workload(tokens, tokens * flops_per_token, None if peak is None else peak * jax.device_count())


def _agreed(requested: bool, step: int, every: int) -> bool:
    """Whether any process was asked to stop; several leave the loop together, so they ask each other now and then."""
    if jax.process_count() == 1:
        return requested
    return step % every == 0 and bool(np.any(multihost_utils.process_allgather(np.asarray(requested))))


def _check_periods(config: ConfigDict) -> None:
    for field in ("steps", "log_every", "eval_every", "checkpoint_every"):
        if config[field] < 1:
            checks.fail(f"train.{field}", config[field], "at least 1")


def _store_config(config: ConfigDict, workdir: str, notes: list[str]) -> None:
    """Write config.json; where a run resumes with another one, say what changed."""
    path = os.path.join(workdir, "config.json")
    now = json.loads(config.to_json_best_effort())
    if os.path.exists(path):
        with open(path) as file:
            before = json.load(file)
        old, new = _flat(before), _flat(now)
        changed = [
            f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)
        ]
        if changed:
            notes.append(f"the config differs from this run's before: {', '.join(changed)}")
    with open(path, "w") as file:
        json.dump(now, file, indent=2)
        file.write("\n")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, part in tree.items() for key, value in _flat(part, f"{prefix}{name}.").items()}
