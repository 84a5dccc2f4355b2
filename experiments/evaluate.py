"""Evaluate a trained model or a published checkpoint: bits per byte of text, or the tasks of lm-evaluation-harness.

    python -m experiments.evaluate --config=configs/quickstart.py --workdir=runs/quickstart --length=2048
    python -m experiments.evaluate --checkpoint=<directory or author/name> --text=book.txt --window=4096 --stride=1024
    python -m experiments.evaluate --checkpoint=<directory or author/name> --tasks=lambada_openai,hellaswag

With --config, on the held-out text of the run: rows of --length tokens, by default four times those of training, show
whether the loss keeps falling, or at least does not rise, beyond what training has seen: a memory of fixed size and a
window should carry on. Writes evaluation.json and positions.png to the workdir.

With --checkpoint, on text files, or without any on the Python library's source. --tasks needs the extra `eval`.
"""

import json
import math
import os

import jax
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from effattn_jax import checks
from effattn_jax.pretrained.text_evaluation import evaluate_texts
from effattn_jax.pretrained.text_model import TextModel
from effattn_jax.training.data import evaluation_documents, open_source
from effattn_jax.training.evaluation import Evaluation, evaluate, make_evaluation_step
from effattn_jax.training.restore import restore_params
from effattn_jax.training.setup import heldout_batches, make_setup
from experiments import cli, model_flags

FLAGS = flags.FlagValues()
LENGTH = flags.DEFINE_integer(
    "length", None, "with --config: tokens in a row; default: four times data.sequence_length", flag_values=FLAGS
)
BUCKETS = flags.DEFINE_integer(
    "buckets", 8, "with --config: ranges of positions, each twice as long as the one before", flag_values=FLAGS
)
TEXTS = flags.DEFINE_multi_string(
    "text", [], "with --checkpoint: a text file; may be given several times", flag_values=FLAGS
)
MAX_BYTES = flags.DEFINE_integer(
    "max_bytes", 100_000, "with --checkpoint: of the Python library's source", flag_values=FLAGS
)
WINDOW = flags.DEFINE_integer(
    "window", 2048, "with --checkpoint: a token is given at most so many before it", flag_values=FLAGS
)
STRIDE = flags.DEFINE_integer(
    "stride", None, "with --checkpoint: tokens from window to window; default: half of it", flag_values=FLAGS
)
BATCH = flags.DEFINE_integer("batch", 8, "with --checkpoint: windows at a time", flag_values=FLAGS)
TASKS = flags.DEFINE_list(
    "tasks", [], "with --checkpoint: tasks of lm-evaluation-harness, instead of texts", flag_values=FLAGS
)
FEW_SHOT = flags.DEFINE_integer(
    "fewshot", None, "examples in front of each question of --tasks; default: the task's", flag_values=FLAGS
)
LIMIT = flags.DEFINE_integer("limit", None, "questions of each of --tasks; default: all", flag_values=FLAGS)
ADD_BOS = flags.DEFINE_bool(
    "add_bos", False, "open the texts of --tasks as the tokenizer does; Gemma needs it", flag_values=FLAGS
)
CHAT = flags.DEFINE_bool(
    "chat_template", False, "put the questions of --tasks into the chat template", flag_values=FLAGS
)


def of_checkpoint() -> None:
    model, tokenizer = model_flags.published()
    if tokenizer is None:
        checks.fail("--checkpoint", "one without a tokenizer", "tokenizer.json beside it, or RWKV's vocabulary")
    if TASKS.value:
        _run_tasks(TextModel(model, tokenizer, window=WINDOW.value, batch_size=BATCH.value, add_bos=ADD_BOS.value))
        return
    texts = [_read(path) for path in TEXTS.value] or evaluation_documents(
        open_source("python_stdlib", "validation"), MAX_BYTES.value
    )
    stride = STRIDE.value or max(1, WINDOW.value // 2)
    found = evaluate_texts(model, tokenizer, texts, window=WINDOW.value, stride=stride, batch_size=BATCH.value)
    print(
        f"{len(texts)} texts, {found.bytes:,} bytes, {found.tokens:,} tokens; windows of {WINDOW.value:,} by {stride:,}"
    )
    print(f"  bits per byte   {found.bits_per_byte:.4f}")
    print(f"  bits per token  {found.bits_per_token:.4f}")
    print(f"  perplexity      {found.perplexity:.4f} of tokens")


def _read(path: str) -> bytes:
    if not os.path.isfile(path):
        checks.fail("--text", repr(path), "a file that is there")
    with open(path, "rb") as file:
        return file.read()


def _run_tasks(text_model: TextModel) -> None:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.utils import make_table

        from effattn_jax.pretrained.harness import HarnessModel
    except ImportError as error:
        checks.fail("--tasks", f"{type(error).__name__}: {error}", "the extra `eval`: make setup EXTRAS=dev,eval")
    (name,) = model_flags.CHECKPOINTS.value
    results = simple_evaluate(
        model=HarnessModel(text_model, name),
        tasks=TASKS.value,
        num_fewshot=FEW_SHOT.value,
        limit=LIMIT.value,
        apply_chat_template=CHAT.value,
    )
    print(make_table(results))


def of_run(config: ConfigDict, workdir: str) -> None:
    if model_flags.CHECKPOINTS.value:
        checks.fail("--checkpoint", "one beside --config", "one of the two")
    setup = make_setup(config)
    trained = config.data.sequence_length
    heldout = heldout_batches(config, setup.tokenizer, LENGTH.value or 4 * trained)
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=setup.shardings.parameters[name])
        for name, x in setup.blueprint.shapes.items()
    }
    step, parameters = restore_params(os.path.join(workdir, "checkpoints"), shapes, step=model_flags.STEP.value)
    result = evaluate(
        make_evaluation_step(setup.blueprint, setup.mesh), parameters, heldout, heldout.byte_count, setup.mesh
    )
    ranges = result.loss_by_position(BUCKETS.value)
    print(f"step {step}, {result.bytes:,} held-out bytes: {result.bits_per_byte:.4f} bits per byte\n")
    print(f"loss by position in the document (rows of training had {trained} tokens):")
    print(f"  {'positions':>14}  bits per token")
    for first, last, nats in ranges:
        beyond = "  beyond the length of training" if first >= trained else ""
        print(f"  {first:>6} .. {last:>5}  {nats / math.log(2):.4f}{beyond}")
    _write(workdir, step, result, ranges)
    _plot(os.path.join(workdir, "positions.png"), ranges, trained)
    print(f"\nwritten: evaluation.json, positions.png in {workdir}")


def _write(workdir: str, step: int, result: Evaluation, ranges: list[tuple[int, int, float]]) -> None:
    summary = {
        "step": step,
        "bits_per_byte": result.bits_per_byte,
        "bytes": result.bytes,
        "bits_by_position": [{"first": a, "last": b, "bits": nats / math.log(2)} for a, b, nats in ranges],
    }
    with open(os.path.join(workdir, "evaluation.json"), "w") as file:
        json.dump(summary, file, indent=2)
        file.write("\n")


def _plot(path: str, ranges: list[tuple[int, int, float]], trained: int) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edges = [ranges[0][0], *(last + 1 for _, last, _ in ranges)]
    axes.stairs([nats / math.log(2) for _, _, nats in ranges], edges, color="#08519c", linewidth=2, baseline=None)
    axes.axvline(trained, color="#737373", linestyle=(0, (4, 3)), linewidth=1)
    axes.annotate(" length of training", (trained, axes.get_ylim()[1]), va="top", color="#737373", fontsize="small")
    axes.set_xscale("symlog", base=2, linthresh=8)
    axes.set_xlabel("position in the document")
    axes.set_ylabel("bits per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    cli.run(of_run, __doc__, without_config=of_checkpoint, own_flags=(FLAGS, model_flags.FLAGS))
