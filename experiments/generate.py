"""Continue a prompt, or talk, with a trained model or a published checkpoint; the text comes as it is made.

    python -m experiments.generate --config=configs/quickstart.py --workdir=runs/quickstart --prompt="class Queue:" \\
        --prompt="def main(" --tokens=200 --temperature=0.8 --top_p=0.95
    python -m experiments.generate --checkpoint=mistralai/Mistral-7B-v0.1 --dtype=bfloat16 --prompt="The sea"
    python -m experiments.generate --checkpoint=<directory> --prompt_ids=1,2,3
    python -m experiments.generate --checkpoint=<author>/<name> --chat

With --config, it must be that of the training run. With --chat each --prompt is a turn of yours; without any, each line
from the terminal is, until it is closed.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
from absl import flags
from ml_collections import ConfigDict

from effattn_jax import checks
from effattn_jax.models import LanguageModel, Sampling, sizes, stream
from effattn_jax.pretrained.chat import Chat
from effattn_jax.pretrained.detokenizer import Detokenizer, pieces
from effattn_jax.pretrained.tokenizer import PretrainedTokenizer
from experiments import cli, model_flags

FLAGS = flags.FlagValues()
PROMPTS = flags.DEFINE_multi_string("prompt", [], "text to continue; may be given several times", flag_values=FLAGS)
PROMPT_IDS = flags.DEFINE_list(
    "prompt_ids", [], "tokens to continue, of a checkpoint: the new ones are printed", flag_values=FLAGS
)
CHAT = flags.DEFINE_bool("chat", False, "a conversation, in the checkpoint's own chat template", flag_values=FLAGS)
SYSTEM = flags.DEFINE_string("system", None, "what the system says first in a --chat", flag_values=FLAGS)
TOKENS = flags.DEFINE_integer("tokens", 200, "at most so many new tokens, of one answer", flag_values=FLAGS)
MAX_LENGTH = flags.DEFINE_integer("max_length", 8192, "tokens of a --chat for which there is room", flag_values=FLAGS)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the best token each time", flag_values=FLAGS)
TOP_K = flags.DEFINE_integer("top_k", None, "draw from the k best tokens", flag_values=FLAGS)
TOP_P = flags.DEFINE_float(
    "top_p", None, "draw from the best tokens that together have this probability", flag_values=FLAGS
)
SEED = flags.DEFINE_integer("seed", 0, "of the draws", flag_values=FLAGS)

Say = Callable[[Sequence[int], int], Iterator[int]]  # a prompt and its number -> tokens


def of_run(config: ConfigDict, workdir: str) -> None:
    model, tokenizer, step = model_flags.trained(config, workdir)
    prompts = PROMPTS.value or ["def "]
    rows = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    print(f"step {step}: {sizes(model, max(map(len, rows)) + TOKENS.value)}")
    continue_texts(speaker(model, [tokenizer.eos]), tokenizer.decode, prompts, rows)


def of_checkpoint() -> None:
    model, tokenizer = model_flags.published()
    if PROMPT_IDS.value:
        print(*speaker(model, ())(prompt_ids(PROMPT_IDS.value), 0))
        return
    if tokenizer is None:
        checks.fail("--checkpoint", "one without a tokenizer", "--prompt_ids")
    if CHAT.value:
        lines = PROMPTS.value or (line.rstrip("\n") for line in sys.stdin)
        talk(Chat(model, tokenizer, max_length=MAX_LENGTH.value, system=SYSTEM.value), lines)
        return
    if not PROMPTS.value:
        checks.fail("flags", "no --prompt", "one, or --prompt_ids or --chat")
    rows = [opened(tokenizer, prompt) for prompt in PROMPTS.value]
    continue_texts(speaker(model, tokenizer.stop_tokens), tokenizer.decode, PROMPTS.value, rows)


def speaker(model: LanguageModel, stop_tokens: Sequence[int]) -> Say:
    """Streams as the flags ask for them."""
    return lambda row, number: stream(
        model, row, max_new_tokens=TOKENS.value, sampling=sampling(), stop_tokens=stop_tokens, key=key(number)
    )


def sampling() -> Sampling:
    return Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)


def key(number: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(SEED.value), number)


def prompt_ids(words: Sequence[str]) -> list[int]:
    try:
        return [int(word) for word in words]
    except ValueError:
        checks.fail("--prompt_ids", ",".join(words), "integers with commas between them")


def opened(tokenizer: PretrainedTokenizer, prompt: str) -> list[int]:
    """The prompt as the authors' tokenizer opens a text; where that leaves nothing, the token that opens a document."""
    ids: list[int] = tokenizer.encode(prompt, special_tokens=True).tolist()
    return ids or ([] if tokenizer.bos is None else [tokenizer.bos])


def continue_texts(
    say: Say, decode: Callable[[Iterable[int]], str], prompts: Sequence[str], rows: Sequence[Sequence[int]]
) -> None:
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        print(f"\n--- {prompt!r}\n{prompt}", end="", flush=True)
        show(pieces(Detokenizer(decode, row), say(row, number)))


def talk(chat: Chat, lines: Iterable[str]) -> None:
    for number, line in enumerate(lines):
        print(f"\n> {line}")
        show(chat.say(line, max_new_tokens=TOKENS.value, sampling=sampling(), key=key(number)))


def show(parts: Iterable[str]) -> None:
    """As they come."""
    for part in parts:
        print(part, end="", flush=True)
    print()


if __name__ == "__main__":
    cli.run(of_run, __doc__, without_config=of_checkpoint, own_flags=(FLAGS, model_flags.FLAGS))
