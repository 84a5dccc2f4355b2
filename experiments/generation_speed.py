"""Tokens per second of generation, over batch sizes and lengths of the context, with random parameters.

    python -m experiments.generation_speed --config=configs/hybrid_125m.py --workdir=runs/generation_speed

For each context length the prompt is read in chunks (prefill), then --tokens tokens are decoded on the device. Before
the table, the continuation by decoding is checked against full forward passes. Writes generation_speed.json.
"""

import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from effattn_jax.models import LanguageModel, Sampling, generate, sizes
from effattn_jax.models.sizes import format_bytes
from effattn_jax.training.data import load_tokenizer
from effattn_jax.training.setup import model_maker
from experiments import cli

FLAGS = flags.FlagValues()
BATCHES = flags.DEFINE_list("batches", ["1", "8", "64"], "batch sizes", flag_values=FLAGS)
CONTEXTS = flags.DEFINE_list("contexts", ["1024", "16384", "65536"], "tokens in the prompts", flag_values=FLAGS)
TOKENS = flags.DEFINE_integer("tokens", 256, "tokens to decode", flag_values=FLAGS)
CHUNK = flags.DEFINE_integer("prefill_chunk", 2048, "tokens read at once", flag_values=FLAGS)


def main(config: ConfigDict, workdir: str) -> None:
    vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
    exact = ConfigDict(config.to_dict() | {"model": config.model.to_dict() | {"dtype": "float32"}})
    with jax.default_matmul_precision("highest"):
        agreement = check(jax.jit(model_maker(exact, vocab_size))())
    model = jax.jit(model_maker(config, vocab_size))()
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {sizes(model, 65536)}")
    print(f"in float32, decoding agrees with full forward passes on {agreement:.0%} of greedy tokens")
    print(f"{'batch':>6}{'context':>9}{'prefill tok/s':>15}{'decode tok/s':>14}{'ms a token':>12}{'peak memory':>13}")
    rows = []
    os.makedirs(workdir, exist_ok=True)
    for context in map(int, CONTEXTS.value):
        for batch in map(int, BATCHES.value):
            row = measure(model, batch, context, TOKENS.value, CHUNK.value)
            rows.append(row)
            peak = format_bytes(row["peak_bytes"]) if row["peak_bytes"] else ""
            print(
                f"{batch:>6}{context:>9}{row['prefill_tokens_per_second']:>15,.0f}"
                f"{row['decode_tokens_per_second']:>14,.0f}{row['milliseconds_per_token']:>12.3f}{peak:>13}",
                flush=True,
            )
            with open(os.path.join(workdir, "generation_speed.json"), "w") as file:  # anew after every row
                table = {"device": device, "jax": jax.__version__, "greedy_agreement": agreement, "rows": rows}
                json.dump(table, file, indent=1)


def check(model: LanguageModel, length: int = 96, tokens: int = 32) -> float:
    """Part of greedily decoded tokens that one full forward pass over the same text would choose too."""
    prompt = np.asarray(jax.random.randint(jax.random.key(0), (length,), 0, model.vocab_size))
    (decoded,) = generate(model, [prompt], max_new_tokens=tokens, sampling=Sampling(temperature=0), prefill_chunk=40)
    text = np.concatenate([prompt, decoded])[None]
    scores, _ = jax.jit(lambda model, text: model(text))(model, jnp.asarray(text))
    return float(np.mean(np.argmax(scores[0, length - 1 : -1], axis=-1) == decoded))


def measure(model: LanguageModel, batch: int, context: int, tokens: int, chunk: int) -> dict[str, float]:
    """Prefill is the time to the first new token, decoding the time of the others; both after compilation."""
    prompts = list(np.asarray(jax.random.randint(jax.random.key(1), (batch, context), 0, model.vocab_size)))
    sampling = Sampling(temperature=1.0, top_p=0.95)

    def seconds(new_tokens: int) -> float:
        began = time.perf_counter()
        generate(
            model,
            prompts,
            max_new_tokens=new_tokens,
            sampling=sampling,
            key=jax.random.key(2),
            prefill_chunk=chunk,
        )
        return time.perf_counter() - began

    for new_tokens in (1, tokens + 1):
        seconds(new_tokens)  # compiles
    prefill, whole = seconds(1), seconds(tokens + 1)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "batch": batch,
        "context": context,
        "prefill_tokens_per_second": batch * context / prefill,
        "decode_tokens_per_second": batch * tokens / (whole - prefill),
        "milliseconds_per_token": 1e3 * (whole - prefill) / tokens,
        "peak_bytes": stats.get("peak_bytes_in_use", 0),
    }


if __name__ == "__main__":
    cli.run(main, __doc__, own_flags=(FLAGS,))
