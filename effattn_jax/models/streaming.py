"""Tokens of one continuation as they are drawn."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from effattn_jax import checks
from effattn_jax.models.generation import DEFAULT_SAMPLING, PREFILL_CHUNK, Request, begin, blocks, cut
from effattn_jax.models.language_model import LanguageModel
from effattn_jax.models.sampling import Sampling
from effattn_jax.typing import Array

BLOCK = 8


def stream(
    model: LanguageModel,
    prompt: Sequence[int] | np.ndarray,
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    stop_tokens: Sequence[int] = (),
    key: Array | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    block: int = BLOCK,
) -> Iterator[int]:
    """The tokens of `generate` for this prompt and key, one after the other, without the stop token.

    The device draws `block` tokens before the host looks at them: one trip to it for so many.

    Raises:
      ValueError: as `generate`, at once rather than with the first token; a block of no tokens.
    """
    check_block(block)
    request = Request.of(model, max_new_tokens, temperature, sampling, stop_tokens, key)
    rows, state = begin(model, [prompt], request, prefill_chunk)
    return until_stop((tokens[0] for tokens, _, _ in blocks(model, rows, state, request, block)), stop_tokens)


def check_block(block: int) -> None:
    if block < 1:
        checks.fail("block", block, "at least 1")


def until_stop(parts: Iterable[np.ndarray], stop_tokens: Sequence[int]) -> Iterator[int]:
    for part in parts:
        kept = cut(part, stop_tokens)
        yield from kept.tolist()
        if len(kept) < len(part):
            return
