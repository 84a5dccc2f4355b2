"""Train a language model, then report: held-out bits per byte beside two baselines, a sample, a plot.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart --config.train.steps=100

The same command goes on where the newest checkpoint in the workdir is. Several processes (a TPU pod, Slurm) join by
themselves when started with --distributed.
"""

import json
import os
import statistics

import jax
from absl import flags
from ml_collections import ConfigDict

from effattn_jax.distributed.runtime import initialize
from effattn_jax.models import Sampling, cut, generate
from effattn_jax.models.sizes import format_bytes
from effattn_jax.training.data import (
    bigram_bits_per_byte,
    evaluation_documents,
    load_tokenizer,
    lzma_bits_per_byte,
    open_source,
)
from effattn_jax.training.loop import Result, train
from effattn_jax.training.metrics import read_metrics
from effattn_jax.training.plot import plot_losses
from effattn_jax.training.setup import make_setup
from experiments import cli

FLAGS = flags.FlagValues()
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "join the other processes of this run before anything else", flag_values=FLAGS
)


def main(config: ConfigDict, workdir: str) -> None:
    if DISTRIBUTED.value:
        initialize()
    result = train(config, workdir)
    if jax.process_index() != 0:
        return
    if result.stopped_by is not None:
        print(f"stopped by {result.stopped_by} after step {result.step}, saved; the same command goes on from there")
        return
    report(config, workdir, result)


def report(config: ConfigDict, workdir: str, result: Result) -> None:
    """Print what came out and write loss.png and summary.json."""
    baselines = heldout_baselines(config) if config.report.baselines else {}
    assert result.evaluation is not None, "a finished run has been evaluated"
    scores = {"this model": result.evaluation.bits_per_byte} | baselines
    bytes_per_token = result.evaluation.bytes / result.evaluation.tokens
    by_bytes = config.data.tokenizer == "bytes"
    plot_losses(
        os.path.join(workdir, "metrics.jsonl"),
        os.path.join(workdir, "loss.png"),
        baselines,
        train_key="loss_bits" if by_bytes else "none",
        title=f"{os.path.basename(workdir)}: {config.data.name}",
    )
    speed = speeds(os.path.join(workdir, "metrics.jsonl"))
    summary = {"step": result.step, "bits_per_byte": scores, "heldout_bytes": result.evaluation.bytes} | speed
    with open(os.path.join(workdir, "summary.json"), "w") as file:
        json.dump(summary, file, indent=2)
        file.write("\n")

    print(f"\nheld-out text, {result.evaluation.bytes:,} bytes ({bytes_per_token:.2f} bytes a token), bits per byte:")
    for name, value in sorted(scores.items(), key=lambda score: score[1]):
        print(f"  {name:<24}{value:6.3f}")
    mfu = f", {speed['mfu']:.1%} of the device's peak (MFU)" if "mfu" in speed else ""
    peak = f", {format_bytes(speed['peak_bytes'])} of device memory at most" if "peak_bytes" in speed else ""
    print(f"\ntraining ran at {speed['tokens_per_second']:,.0f} tokens per second{mfu}{peak}")
    if config.report.tokens:
        print(f"\na sample after {config.report.prompt!r}:")
        print(_indent(sample(config, result)))
    print(f"\nfiles of this run, in {workdir}:")
    print("  loss.png       the learning curve          metrics.jsonl  every number of it")
    print("  checkpoints/   to resume or generate from  summary.json, config.json")


def speeds(metrics_path: str) -> dict[str, float]:
    """Medians over the run, and the most memory that its device held."""
    lines = [line for line in read_metrics(metrics_path) if line["split"] == "train"]
    medians = {
        name: statistics.median(line[name] for line in lines)
        for name in ("tokens_per_second", "mfu")
        if all(name in line for line in lines)
    }
    stats = jax.local_devices()[0].memory_stats() or {}
    return medians | ({"peak_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {})


def heldout_baselines(config: ConfigDict) -> dict[str, float]:
    """Bits per byte of a byte-bigram model of the training text and of lzma, on the very bytes of the evaluation."""
    data = config.data
    source = open_source(data.name, "train", data.directory, text_key=data.text_key)
    heldout = evaluation_documents(
        open_source(data.name, "validation", data.directory, text_key=data.text_key), config.eval.max_bytes
    )
    return {
        "byte bigrams": bigram_bits_per_byte((source[i] for i in range(len(source))), heldout),
        "lzma": lzma_bits_per_byte(heldout),
    }


def sample(config: ConfigDict, result: Result) -> str:
    tokenizer = load_tokenizer(config.data.tokenizer)
    prompt = [tokenizer.bos, *tokenizer.encode(config.report.prompt)]
    (continuation,) = generate(
        make_setup(config).blueprint.model(result.parameters),
        [prompt],
        max_new_tokens=config.report.tokens,
        sampling=Sampling(temperature=config.report.temperature, top_p=config.report.top_p),
        stop_tokens=[tokenizer.eos],
        key=jax.random.key(config.seed),
    )
    return config.report.prompt + tokenizer.decode(cut(continuation, [tokenizer.eos]))


def _indent(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())


if __name__ == "__main__":
    cli.run(main, __doc__, own_flags=(FLAGS,))
