"""How likely a model finds given tokens: rows of them, and texts longer than a row, in windows."""

import math
from collections.abc import Iterator, Sequence
from itertools import batched
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.models.decoding import DOCUMENT, PADDING
from effattn_jax.models.generation import as_tokens
from effattn_jax.models.language_model import LanguageModel
from effattn_jax.typing import Array, Bool, Float, Int

SHORTEST = 32  # rows are padded to it, or to a power of two above, so that few programs are compiled
CHUNK = 256  # tokens whose scores over the vocabulary exist at once


class TokenScores(NamedTuple):
    """Of a row of n tokens, for all but the first.

    Args:
      log_probability: log p(x_t | x_<t), in nats.
      best: whether no other token is likelier.
    """

    log_probability: Float[np.ndarray, " n-1"]
    best: Bool[np.ndarray, " n-1"]


def token_scores(
    model: LanguageModel, rows: Sequence[Sequence[int] | np.ndarray], *, batch_size: int = 8
) -> list[TokenScores]:
    """Rows of different lengths, `batch_size` at a time, the longest first; returned in the given order.

    Raises:
      ValueError: an empty row, or tokens outside of the vocabulary.
    """
    if batch_size < 1:
        checks.fail("batch_size", batch_size, "at least 1")
    checked = [as_tokens(f"rows[{i}]", row, model.vocab_size) for i, row in enumerate(rows)]
    order = sorted(range(len(checked)), key=lambda i: -len(checked[i]))
    found: dict[int, TokenScores] = {}
    for indices in batched(order, batch_size):
        length = max(SHORTEST, 1 << (len(checked[indices[0]]) - 1).bit_length())
        tokens = np.zeros((batch_size, length), np.int32)
        segment_ids = np.full((batch_size, length), PADDING, np.int32)
        for row, i in enumerate(indices):
            tokens[row, : len(checked[i])], segment_ids[row, : len(checked[i])] = checked[i], DOCUMENT
        log_probability, best = map(np.asarray, _scores(model, tokens, segment_ids))
        for row, i in enumerate(indices):
            end = len(checked[i]) - 1
            found[i] = TokenScores(log_probability[row, :end], best[row, :end])
    return [found[i] for i in range(len(checked))]


@jax.jit
def _scores(
    model: LanguageModel, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Of the token behind each; of the last it is whatever."""
    hidden, _ = model.hidden(tokens, segment_ids=segment_ids)
    targets = jnp.roll(tokens, -1, axis=1)
    chunk = math.gcd(CHUNK, tokens.size)

    def score(part: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = part
        logits = model.logits(hidden[None])[0]
        target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return target - jax.nn.logsumexp(logits, axis=-1), target >= jnp.max(logits, axis=-1)

    parts = hidden.reshape(-1, chunk, hidden.shape[-1]), targets.reshape(-1, chunk)
    log_probability, best = jax.lax.map(score, parts)
    return log_probability.reshape(tokens.shape), best.reshape(tokens.shape)


class Window(NamedTuple):
    """tokens[begin:end] are read, those from `first` on are counted."""

    begin: int
    first: int
    end: int


def windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """Windows that count each of `length` tokens but the first once, each given at most the `window` tokens before.

    They move on by `stride` tokens, all of which are new. The first window counts all it has; in the others a token is
    given at least window - stride + 1 of those before. With stride = window they do not overlap, but for the last, that
    is as long as the others: the way of lm-evaluation-harness.

    Raises:
      ValueError: a window of no tokens, a stride that leaves tokens out.
    """
    if window < 1:
        checks.fail("window", window, "at least 1")
    if not 1 <= stride <= window:
        checks.fail("stride", stride, f"1 .. {window}, the window")
    first, end = 1, min(length, window + 1)
    while first < length:
        yield Window(max(0, end - window - 1), first, end)
        first, end = end, min(length, end + stride)


def log_probability(
    model: LanguageModel,
    texts: Sequence[Sequence[int] | np.ndarray],
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
) -> Iterator[Float[np.ndarray, " n-1"]]:
    """log p of every token of each text but its first, in windows; `stride` None is the window.

    Raises:
      ValueError: what `windows` and `token_scores` raise.
    """
    stride = window if stride is None else stride
    for text in texts:
        parts = list(windows(len(text), window, stride))
        found = token_scores(model, [text[part.begin : part.end] for part in parts], batch_size=batch_size)
        yield np.concatenate(
            [
                np.zeros(0, np.float32),
                *(s.log_probability[p.first - p.begin - 1 :] for p, s in zip(parts, found, strict=True)),
            ]
        )
