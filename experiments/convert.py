"""A trained transformer as a hybrid: other mixers in some blocks, its weights where they fit, then distillation.

    python -m experiments.train --config=configs/dense_small.py --workdir=runs/dense_small
    python -m experiments.convert --config=configs/dense_small.py --workdir=runs/dense_small --output=runs/hybrid
    python -m experiments.generate --config=configs/run.py:runs/hybrid --workdir=runs/hybrid

1. Every block gets `--mixer`, but each `--keep_every`-th keeps its attention; weights stay where names and shapes fit.
2. Attention transfer: each new mixer learns to give what the attention gave for the same input, all at once, for
   `--transfer_steps` steps: sum over blocks of mean |mixer(x) - attention(x)|^2 / mean |attention(x)|^2 (Zhang et al.
   2024, arXiv:2410.10254; Bick et al. 2024, arXiv:2408.10189).
3. Distillation: all weights learn KL(teacher || student) of the next token, for `--distil_steps` steps.

Text, rows and optimiser are those of the config; `--checkpoint` names a published model as the teacher instead of the
run. With `--control` the same steps are also spent without the teacher's weights in the new mixers and without
transfer. Prints and writes held-out bits per byte after each part (convert.json) and the student's run.
"""

import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags
from flax import nnx
from ml_collections import ConfigDict

from effattn_jax import checks
from effattn_jax.models import LanguageModel
from effattn_jax.models.blueprint import Blueprint, Parameters, blueprint, parameters_of
from effattn_jax.models.conversion import block_names, pattern_of, reuse, with_mixer
from effattn_jax.pretrained import load
from effattn_jax.pretrained.build import language_model_options
from effattn_jax.training.checkpoint import Checkpoints
from effattn_jax.training.data import Tokenizer, load_tokenizer
from effattn_jax.training.evaluation import evaluate, make_evaluation_step
from effattn_jax.training.restore import restore_params
from effattn_jax.training.setup import DTYPES, heldout_batches, model_maker
from effattn_jax.training.sharding import make_mesh
from experiments import cli
from experiments.distillation import distillation_loss, fitted, transfer_loss
from experiments.report import write_report

FLAGS = flags.FlagValues()
MIXER = flags.DEFINE_string("mixer", "gated_delta_net", "what takes the place of attention", flag_values=FLAGS)
MIXER_OPTIONS = flags.DEFINE_string("mixer_options", "{}", "its options, as JSON", flag_values=FLAGS)
KEEP_EVERY = flags.DEFINE_integer(
    "keep_every", 4, "the last of so many blocks keeps its attention; 0: none does", flag_values=FLAGS
)
TRANSFER_STEPS = flags.DEFINE_integer("transfer_steps", 100, "steps of attention transfer", flag_values=FLAGS)
DISTIL_STEPS = flags.DEFINE_integer("distil_steps", 200, "steps of distillation", flag_values=FLAGS)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "a published model as the teacher: directory or hub name", flag_values=FLAGS
)
CONTROL = flags.DEFINE_bool("control", False, "also distil into new mixers that start from nothing", flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", "runs/converted", "where the student's run goes", flag_values=FLAGS)

Model = tuple[Blueprint[LanguageModel], Parameters]


def main(config: ConfigDict, workdir: str) -> None:
    if os.path.exists(os.path.join(OUTPUT.value, "config.json")):
        checks.fail("output", f"{OUTPUT.value}, which holds a run", "a directory without one")
    tokenizer = load_tokenizer(config.data.tokenizer)
    options, teacher = teacher_of(config, workdir, tokenizer)
    every, count = KEEP_EVERY.value, len(block_names(options))
    replaced = [i for i in range(count) if not every or (i + 1) % every]
    changed = with_mixer(options, MIXER.value, replaced, json.loads(MIXER_OPTIONS.value))
    make = functools.partial(model_of, changed, config.seed)
    plan, fresh = blueprint(make), jax.jit(lambda: parameters_of(make()))()
    old = options["mixers"][block_names(options)[replaced[0]]]
    again = functools.partial(
        reuse,
        teacher[1],
        pattern_of(options),
        fresh,
        pattern_of(changed),
        head_dim=old.get("head_dim") or options["dim"] // old["heads"],
    )
    student, taken = again()
    total = sum(x.size for x in student.values())
    share = sum(taken.values()) / total
    print(f"{MIXER.value} in blocks {replaced} of {count}; {share:.1%} of {total:,} numbers are the teacher's")

    rows: list[dict[str, Any]] = []
    path = os.path.join(OUTPUT.value, "convert.json")  # anew after every row

    def told(name: str, model: Model) -> None:
        rows.append({"model": name, "bits_per_byte": bits_per_byte(config, tokenizer, model)})
        print(f"held out, {name}: {rows[-1]['bits_per_byte']:.4f} bits per byte", flush=True)
        write_report(path, "experiments.convert", rows, replaced=replaced, blocks=count, reused=share)

    fit = lambda parameters, *how: fitted(config, tokenizer, teacher, (plan, parameters), *how)  # noqa: E731
    told("teacher", teacher)
    told("student with the teacher's weights", (plan, student))
    transfer = functools.partial(transfer_loss, replaced=replaced)
    student = fit(student, transfer, TRANSFER_STEPS.value, "attention transfer")
    told("after attention transfer", (plan, student))
    student = fit(student, distillation_loss, DISTIL_STEPS.value, "distillation")
    told("after distillation", (plan, student))
    save(config, changed, student)
    if CONTROL.value:
        control, steps = again(new=replaced)[0], TRANSFER_STEPS.value + DISTIL_STEPS.value
        control = fit(control, distillation_loss, steps, "control")
        told("control: new mixers from nothing, distillation alone", (plan, control))
    print(f"--config=configs/run.py:{OUTPUT.value} --workdir={OUTPUT.value} names the student; {path}")


def model_of(options: Mapping[str, Any], seed: int) -> LanguageModel:
    return LanguageModel(**options, rngs=nnx.Rngs(seed))


def teacher_of(config: ConfigDict, workdir: str, tokenizer: Tokenizer) -> tuple[dict[str, Any], Model]:
    """Options of `LanguageModel`, and the trained model."""
    if CHECKPOINT.value is not None:
        model = load(CHECKPOINT.value)
        options = language_model_options(model.source.config) | {"dtype": model.dtype}
        if options["vocab_size"] < tokenizer.vocab_size:
            checks.fail("data.tokenizer", f"{tokenizer.vocab_size} tokens", f"at most {options['vocab_size']}")
        return options, (blueprint(lambda: model), parameters_of(model))
    plan = blueprint(model_maker(config, tokenizer.vocab_size))
    _, parameters = restore_params(os.path.join(workdir, "checkpoints"), plan.shapes)
    options = config.model.to_dict()
    options |= {"vocab_size": options["vocab_size"] or tokenizer.vocab_size, "dtype": DTYPES[options["dtype"]]}
    return options, (plan, parameters)


def bits_per_byte(config: ConfigDict, tokenizer: Tokenizer, model: Model) -> float:
    """On the held-out text of the config."""
    mesh = make_mesh(config.mesh)
    heldout = heldout_batches(config, tokenizer)
    found = evaluate(make_evaluation_step(model[0], mesh), model[1], heldout, heldout.byte_count, mesh)
    return float(found.bits_per_byte)


def save(config: ConfigDict, options: Mapping[str, Any], parameters: Parameters) -> None:
    """A run that generation, evaluation and training can go on from."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    stored = json.loads(config.to_json_best_effort())
    stored["model"] = dict(options) | {"dtype": names[options["dtype"]]}
    os.makedirs(OUTPUT.value, exist_ok=True)
    with open(os.path.join(OUTPUT.value, "config.json"), "w") as file:
        json.dump(stored, file, indent=2)
        file.write("\n")
    with Checkpoints(os.path.join(OUTPUT.value, "checkpoints")) as checkpoints:
        checkpoints.save(0, {"params": parameters}, wait=True)


if __name__ == "__main__":
    cli.run(main, __doc__, own_flags=(FLAGS,))
