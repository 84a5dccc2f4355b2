"""Continue a prompt with a trained model.

    python -m experiments.generate --config=configs/quickstart.py --workdir=runs/quickstart --prompt="class Queue:" \\
        --prompt="def main(" --tokens=200 --temperature=0.8 --top_p=0.95

Several --prompt flags are continued together. The config must be that of the training run.
"""

import os

import jax
from absl import flags
from ml_collections import ConfigDict

from effattn_jax.models import Sampling, cut, generate, sizes
from effattn_jax.models.blueprint import blueprint
from effattn_jax.training.data import load_tokenizer
from effattn_jax.training.restore import restore_params
from effattn_jax.training.setup import model_maker
from experiments import cli

PROMPTS = flags.DEFINE_multi_string("prompt", ["def "], "text to continue; may be given several times")
TOKENS = flags.DEFINE_integer("tokens", 200, "at most so many new tokens")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the best token each time")
TOP_K = flags.DEFINE_integer("top_k", None, "draw from the k best tokens")
TOP_P = flags.DEFINE_float("top_p", None, "draw from the best tokens that together have this probability")
SEED = flags.DEFINE_integer("seed", 0, "of the draws")
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the newest")


def main(config: ConfigDict, workdir: str) -> None:
    tokenizer = load_tokenizer(config.data.tokenizer)
    plan = blueprint(model_maker(config, tokenizer.vocab_size))
    step, parameters = restore_params(os.path.join(workdir, "checkpoints"), plan.shapes, step=STEP.value)
    model = plan.model(parameters)
    prompts = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in PROMPTS.value]
    print(f"step {step}: {sizes(model, max(map(len, prompts)) + TOKENS.value)}")
    continuations = generate(
        model,
        prompts,
        max_new_tokens=TOKENS.value,
        sampling=Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value),
        stop_tokens=[tokenizer.eos],
        key=jax.random.key(SEED.value),
    )
    for prompt, tokens in zip(PROMPTS.value, continuations, strict=True):
        print(f"\n--- {prompt!r}\n{prompt}{tokenizer.decode(cut(tokens, [tokenizer.eos]))}")


if __name__ == "__main__":
    cli.run(main, __doc__)
