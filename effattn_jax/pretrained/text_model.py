"""What benchmarks ask of a model about texts: how likely one is, and how it goes on."""

import functools
from collections.abc import Mapping, Sequence
from itertools import batched, groupby
from typing import Any

import jax
import numpy as np

from effattn_jax import checks
from effattn_jax.models import LanguageModel, Sampling
from effattn_jax.models.generation import Request, begin, blocks, cut
from effattn_jax.models.scoring import log_probability, token_scores
from effattn_jax.pretrained.detokenizer import Detokenizer, pieces
from effattn_jax.pretrained.tokenizer import PretrainedTokenizer

BLOCK, LARGEST_CHUNK = 16, 512
MAX_NEW_TOKENS = 256
GENERATION = ("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p")


class TextModel:
    """The three questions of lm-evaluation-harness, over a model and its tokenizer.

    Args:
      window: a token is given at most so many before it.
      batch_size: texts at a time.
      add_bos: texts open as the authors' tokenizer opens them; else with their first word.
      seed: of what is drawn.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: PretrainedTokenizer,
        *,
        window: int,
        batch_size: int = 8,
        add_bos: bool = False,
        seed: int = 0,
    ):
        if window < 1:
            checks.fail("window", window, "at least 1")
        self.model, self.tokenizer, self.window, self.batch_size = model, tokenizer, window, batch_size
        self.add_bos, self.seed = add_bos, seed

    def log_likelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of (context, continuation): log p(continuation | context) in nats, and whether it is the greedy one.

        Where the two are too long together, the beginning of the context is left out.

        Raises:
          ValueError: a continuation without tokens, or longer than the window.
        """
        rows, counts = [], []
        for context, continuation in pairs:
            before, behind = self._split(context, continuation)
            if not 1 <= len(behind) <= self.window:
                checks.fail("continuation", f"{len(behind)} tokens", f"1 .. {self.window}, the window")
            rows.append([*before, *behind][-self.window - 1 :])
            counts.append(len(behind))
        scores = token_scores(self.model, rows, batch_size=self.batch_size)
        return [
            (float(np.sum(found.log_probability[-count:], dtype=np.float64)), bool(found.best[-count:].all()))
            for found, count in zip(scores, counts, strict=True)
        ]

    def log_likelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """log p(text) in nats, in windows side by side; the first token is given the one that opens documents."""
        rows = [[self._opening(), *self.tokenizer.encode(text)] for text in texts]
        found = log_probability(self.model, rows, window=self.window, batch_size=self.batch_size)
        return [float(np.sum(part, dtype=np.float64)) for part in found]

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Continuations of (context, options), up to one of `until` or a stop token.

        Options: until, a text or several; max_gen_toks (256); do_sample (False: greedy), temperature, top_k, top_p.

        Raises:
          ValueError: an option that is not known.
        """
        options = [_options(i, given) for i, (_, given) in enumerate(requests)]
        prompts = [self._encode(context).tolist() or [self._opening()] for context, _ in requests]
        order = sorted(range(len(requests)), key=lambda i: (repr(options[i]), -len(prompts[i])))
        found: dict[int, str] = {}
        for _, group in groupby(order, key=lambda i: repr(options[i])):
            for indices in batched(group, self.batch_size):
                texts = self._continue([prompts[i] for i in indices], **options[indices[0]])
                found |= dict(zip(indices, texts, strict=True))
        return [found[i] for i in range(len(requests))]

    def _continue(
        self, prompts: Sequence[list[int]], *, until: Sequence[str], max_new_tokens: int, sampling: Sampling
    ) -> list[str]:
        """Sizes are rounded up, so that few programs are compiled: batches, prompts and the room for both."""
        key, count = jax.random.key(self.seed), len(prompts)
        request = Request.of(self.model, max_new_tokens, None, sampling, self.tokenizer.stop_tokens, key)
        prompts = [prompt[-max(1, self.window - max_new_tokens) :] for prompt in prompts]
        longest = max(map(len, prompts))
        chunk = min(LARGEST_CHUNK, power_of_two(longest) // 2 or 1)
        padded = -(-longest // chunk) * chunk
        room = power_of_two(padded + max_new_tokens) - padded
        filled = [*prompts, *[prompts[-1]] * (self.batch_size - count)]
        rows, state = begin(self.model, filled, request._replace(max_new_tokens=room), chunk)
        drawn, texts = np.zeros((count, 0), np.int32), [""] * count
        for tokens, after, _ in blocks(self.model, rows, state, request, BLOCK):
            drawn = np.concatenate([drawn, tokens[:count]], axis=1)
            texts = [self._text(prompt, row) for prompt, row in zip(prompts, drawn, strict=True)]
            done = [any(end in text for end in until) for text in texts]
            if np.all(done | np.asarray(after.finished)[:count]):
                break
        return [functools.reduce(lambda text, end: text.split(end)[0], until, text) for text in texts]

    def _text(self, prompt: list[int], row: np.ndarray) -> str:
        kept = cut(row, self.tokenizer.stop_tokens).tolist()
        return "".join(pieces(Detokenizer(self.tokenizer.decode, prompt), kept))

    def _encode(self, text: str) -> np.ndarray:
        return self.tokenizer.encode(text, special_tokens=self.add_bos)

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of the two as they lie in the whole; spaces at the end of the context go to the continuation."""
        bare = context.rstrip()
        if not bare:
            return [self._opening()], self.tokenizer.encode(context + continuation).tolist()
        whole, before = self._encode(context + continuation).tolist(), self._encode(bare).tolist()
        return before, whole[len(before) :]

    def _opening(self) -> int:
        if self.tokenizer.bos is None:
            checks.fail("tokenizer", "one without a token that opens documents", "a context for every text")
        return self.tokenizer.bos


def power_of_two(n: int) -> int:
    """The first from n on."""
    return 1 << (n - 1).bit_length()


def _options(number: int, given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(given) - set(GENERATION))
    if unknown:
        checks.fail(f"requests[{number}]", f"the options {', '.join(unknown)}", f"some of {', '.join(GENERATION)}")
    until = given.get("until") or []
    sampled = given.get("do_sample", given.get("temperature", 0) > 0)
    return {
        "until": [until] if isinstance(until, str) else list(until),
        "max_new_tokens": int(given.get("max_gen_toks", given.get("max_new_tokens", MAX_NEW_TOKENS))),
        "sampling": Sampling(
            float(given.get("temperature", 1.0)) if sampled else 0.0, given.get("top_k"), given.get("top_p")
        ),
    }
