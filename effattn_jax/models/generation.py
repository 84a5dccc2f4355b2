"""Continuing prompts: prefill in chunks, then a decoding loop that stays on the device."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.models.language_model import LanguageModel
from effattn_jax.models.sampling import Sampling, sample
from effattn_jax.typing import Array, Bool, Float, Int

PADDING, DOCUMENT = -1, 0
DEFAULT_SAMPLING = Sampling()


class Decoding(NamedTuple):
    """Carry of the decoding loop."""

    step: Int[Array, ""]
    scores: Float[Array, "B vocab"]  # of the next token
    state: Any
    key: Array
    finished: Bool[Array, " B"]
    tokens: Int[Array, "B steps"]


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | np.ndarray] | np.ndarray | Array,
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    stop_tokens: Sequence[int] = (),
    key: Array | None = None,
    prefill_chunk: int = 512,
) -> Int[np.ndarray, "B n"]:
    """Continue each prompt by `max_new_tokens` tokens: [B, n]. After a stop token a row repeats it, see `cut`.

    Prompts of different lengths are padded at the front with tokens that the model neither writes nor reads, so each
    continues as if it were alone. `temperature` stands for that of `sampling`; `key` is needed unless it is 0.

    Raises:
      ValueError: an empty prompt, a prompt or stop token outside the vocabulary, or sampling options out of range.
    """
    if temperature is not None:
        sampling = sampling._replace(temperature=temperature)
    sampling.check(model.vocab_size)
    if max_new_tokens < 1:
        checks.fail("max_new_tokens", max_new_tokens, "at least 1")
    if prefill_chunk < 1:
        checks.fail("prefill_chunk", prefill_chunk, "at least 1")
    if any(not 0 <= token < model.vocab_size for token in stop_tokens):
        checks.fail("stop_tokens", tuple(stop_tokens), f"tokens 0 .. {model.vocab_size - 1}")
    if key is None and sampling.temperature > 0:
        checks.fail("key", None, "a jax.random key, since temperature > 0")
    tokens, padding = _pad(prompts, model.vocab_size, prefill_chunk)
    state = model.init_state(len(tokens), tokens.shape[1] + max_new_tokens)
    for start in range(0, tokens.shape[1], prefill_chunk):
        scores, state = _prefill(model, tokens[:, start : start + prefill_chunk], state, padding, start)
    result, _ = _decode(
        model,
        scores,
        state,
        jnp.asarray(tokens.shape[1] - padding),
        jax.random.key(0) if key is None else key,
        jnp.asarray(stop_tokens, jnp.int32),
        max_new_tokens,
        sampling,
    )
    return _repeat_stops(np.array(result), stop_tokens)


def cut(row: Int[np.ndarray, " n"], stop_tokens: Sequence[int]) -> Int[np.ndarray, " m"]:
    """What comes before the first stop token."""
    stops = np.flatnonzero(np.isin(row, np.asarray(stop_tokens, np.int32)))
    return row[: stops[0]] if stops.size else row


def _pad(
    prompts: Sequence[Sequence[int] | np.ndarray] | np.ndarray | Array, vocab_size: int, chunk: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Rows of one length, a multiple of the chunk where longer than one, and the padding at the front of each."""
    rows = [np.asarray(prompt) for prompt in prompts]
    for i, row in enumerate(rows):
        if row.ndim != 1 or not row.size:
            checks.fail(f"prompts[{i}]", f"shape {row.shape}", "at least one token")
        if not np.issubdtype(row.dtype, np.integer):
            checks.fail(f"prompts[{i}]", f"dtype {row.dtype}", "integers")
        if row.min() < 0 or row.max() >= vocab_size:
            checks.fail(f"prompts[{i}]", f"tokens {row.min()} .. {row.max()}", f"tokens 0 .. {vocab_size - 1}")
    if not rows:
        checks.fail("prompts", "none", "at least one prompt")
    longest = max(len(row) for row in rows)
    length = longest if longest <= chunk else -(-longest // chunk) * chunk
    padding = np.asarray([length - len(row) for row in rows], np.int32)
    return np.stack([np.pad(row.astype(np.int32), (length - len(row), 0)) for row in rows]), padding


@functools.partial(jax.jit, donate_argnums=(2,))
def _prefill(model: LanguageModel, tokens: Array, state: Any, padding: Array, start: Array) -> tuple[Array, Any]:
    """Scores after the last token of a chunk, and the state."""
    positions = start + jnp.arange(tokens.shape[1])[None] - padding[:, None]
    segment_ids = jnp.where(positions >= 0, DOCUMENT, PADDING)
    hidden, state = model.hidden(tokens, state, segment_ids=segment_ids, positions=positions)
    return model.logits(hidden[:, -1:])[:, 0], state


@functools.partial(jax.jit, static_argnames=("steps", "sampling"), donate_argnums=(2,))
def _decode(
    model: LanguageModel,
    scores: Array,
    state: Any,
    position: Array,
    key: Array,
    stop_tokens: Array,
    steps: int,
    sampling: Sampling,
) -> tuple[Int[Array, "B steps"], Any]:
    """Draw, feed back, repeat; until every row has drawn a stop token or `steps` tokens are there."""

    def step(carry: Decoding) -> Decoding:
        key, draw = jax.random.split(carry.key)
        token = sample(draw, carry.scores, sampling)
        tokens = jax.lax.dynamic_update_index_in_dim(carry.tokens, token, carry.step, axis=1)
        finished = carry.finished | jnp.isin(token, stop_tokens)
        hidden, state = model.hidden(token[:, None], carry.state, positions=(position + carry.step)[:, None])
        return Decoding(carry.step + 1, model.logits(hidden)[:, 0], state, key, finished, tokens)

    def unfinished(carry: Decoding) -> Array:
        return (carry.step < steps) & ~jnp.all(carry.finished)

    tokens = jnp.zeros((scores.shape[0], steps), jnp.int32)
    finished = jnp.zeros(scores.shape[:1], bool)
    start = Decoding(jnp.zeros((), jnp.int32), scores, state, key, finished, tokens)
    end = jax.lax.while_loop(unfinished, step, start)
    return end.tokens, end.state  # the state goes out so that its buffers, donated, serve the loop


def _repeat_stops(rows: Int[np.ndarray, "B n"], stop_tokens: Sequence[int]) -> Int[np.ndarray, "B n"]:
    for row in rows:
        end = len(cut(row, stop_tokens))
        row[end:] = row[end] if end < len(row) else 0
    return rows
