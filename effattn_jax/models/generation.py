"""Continuing prompts: prefill in chunks, then a decoding loop that stays on the device."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.models.attachment import reads_prompts_at_once
from effattn_jax.models.decoding import Rows, draw, read
from effattn_jax.models.language_model import LanguageModel
from effattn_jax.models.sampling import Sampling
from effattn_jax.typing import Array, Int

DEFAULT_SAMPLING = Sampling()
PREFILL_CHUNK = 512

Prompts = Sequence[Sequence[int] | np.ndarray] | np.ndarray | Array


def generate(
    model: LanguageModel,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    stop_tokens: Sequence[int] = (),
    key: Array | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Int[np.ndarray, "B n"]:
    """Continue each prompt by `max_new_tokens` tokens: [B, n]. After a stop token a row repeats it, see `cut`.

    Prompts of different lengths are padded at the front with tokens that the model neither writes nor reads, so each
    continues as if it were alone. `temperature` stands for that of `sampling`; `key` is needed unless it is 0.

    Raises:
      ValueError: an empty prompt, a prompt or stop token outside the vocabulary, or sampling options out of range.
    """
    request = Request.of(model, max_new_tokens, temperature, sampling, stop_tokens, key)
    rows, state = begin(model, prompts, request, prefill_chunk)
    result = np.zeros((len(rows.scores), max_new_tokens), np.int32)
    for tokens, _, _ in blocks(model, rows, state, request, max_new_tokens):  # one block
        result[:, : tokens.shape[1]] = tokens
    return _repeat_stops(result, stop_tokens)


def cut(row: Int[np.ndarray, " n"], stop_tokens: Sequence[int]) -> Int[np.ndarray, " m"]:
    """What comes before the first stop token."""
    stops = np.flatnonzero(np.isin(row, np.asarray(stop_tokens, np.int32)))
    return row[: stops[0]] if stops.size else row


class Request(NamedTuple):
    """What is asked for, checked."""

    max_new_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    key: Array

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        max_new_tokens: int,
        temperature: float | None,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        key: Array | None,
    ) -> "Request":
        """Arguments of `generate`."""
        if temperature is not None:
            sampling = sampling._replace(temperature=temperature)
        sampling.check(model.vocab_size)
        if max_new_tokens < 1:
            checks.fail("max_new_tokens", max_new_tokens, "at least 1")
        if any(not 0 <= token < model.vocab_size for token in stop_tokens):
            checks.fail("stop_tokens", tuple(stop_tokens), f"tokens 0 .. {model.vocab_size - 1}")
        if key is None and sampling.temperature > 0:
            checks.fail("key", None, "a jax.random key, since temperature > 0")
        return cls(max_new_tokens, sampling, tuple(stop_tokens), jax.random.key(0) if key is None else key)


def begin(model: LanguageModel, prompts: Prompts, request: Request, prefill_chunk: int) -> tuple[Rows, Any]:
    """The prompts read, chunk by chunk: where the rows stand, and the state, with room for what is asked for."""
    check_chunk(prefill_chunk)
    tokens, padding = _pad(prompts, model.vocab_size, prefill_chunk)
    if reads_prompts_at_once(block for _, block in model.parts()):
        if tokens.shape[1] > prefill_chunk:
            checks.fail(
                "prefill_chunk", prefill_chunk, "the length of the prompts: attached mechanisms read them at once"
            )
        if padding.any():
            checks.fail("prompts", "several lengths", "one length: attached mechanisms have no padding")
    pads = jnp.asarray(padding) if padding.any() else None
    state = model.init_state(len(tokens), tokens.shape[1] + request.max_new_tokens)
    for start in range(0, tokens.shape[1], prefill_chunk):
        scores, state = read(model, tokens[:, start : start + prefill_chunk], state, pads, start)
    position = jnp.asarray(tokens.shape[1] - padding)
    return Rows(scores, position, request.key, jnp.zeros(len(tokens), bool)), state


def blocks(
    model: LanguageModel, rows: Rows, state: Any, request: Request, size: int
) -> Iterator[tuple[Int[np.ndarray, "B n"], Rows, Any]]:
    """The tokens as they come, `size` steps at a time, with where the rows and the state stand then.

    Ends with the block in which the last row draws a stop token. The state that is given, and each but the last that
    is yielded, are used up by the next block.
    """
    left, stop_tokens = request.max_new_tokens, jnp.asarray(request.stop_tokens, jnp.int32)
    while left:
        limit = min(size, left)
        tokens, count, rows, state = draw(model, rows, state, stop_tokens, limit, steps=size, sampling=request.sampling)
        yield np.asarray(tokens)[:, : int(count)], rows, state
        left = 0 if np.all(rows.finished) else left - limit


def check_chunk(prefill_chunk: int) -> None:
    if prefill_chunk < 1:
        checks.fail("prefill_chunk", prefill_chunk, "at least 1")


def as_tokens(argument: str, tokens: Sequence[int] | np.ndarray | Array, vocab_size: int) -> Int[np.ndarray, " n"]:
    """One row.

    Raises:
      ValueError: none at all, other numbers than integers, or outside the vocabulary.
    """
    row = np.asarray(tokens)
    if row.ndim != 1 or not row.size:
        checks.fail(argument, f"shape {row.shape}", "at least one token")
    if not np.issubdtype(row.dtype, np.integer):
        checks.fail(argument, f"dtype {row.dtype}", "integers")
    if row.min() < 0 or row.max() >= vocab_size:
        checks.fail(argument, f"tokens {row.min()} .. {row.max()}", f"tokens 0 .. {vocab_size - 1}")
    return row.astype(np.int32)


def _pad(prompts: Prompts, vocab_size: int, chunk: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Rows of one length, a multiple of the chunk where longer than one, and the padding at the front of each."""
    rows = [as_tokens(f"prompts[{i}]", prompt, vocab_size) for i, prompt in enumerate(prompts)]
    if not rows:
        checks.fail("prompts", "none", "at least one prompt")
    longest = max(len(row) for row in rows)
    length = longest if longest <= chunk else -(-longest // chunk) * chunk
    padding = np.asarray([length - len(row) for row in rows], np.int32)
    return np.stack([np.pad(row, (length - len(row), 0)) for row in rows]), padding


def _repeat_stops(rows: Int[np.ndarray, "B n"], stop_tokens: Sequence[int]) -> Int[np.ndarray, "B n"]:
    for row in rows:
        end = len(cut(row, stop_tokens))
        row[end:] = row[end] if end < len(row) else 0
    return rows
