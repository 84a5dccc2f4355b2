"""How well a model predicts texts: bits per byte and per token, and perplexity."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from effattn_jax import checks
from effattn_jax.models import LanguageModel
from effattn_jax.models.scoring import log_probability
from effattn_jax.pretrained.tokenizer import PretrainedTokenizer


class TextEvaluation(NamedTuple):
    """Args:
    nats: -log p of all tokens that are counted.
    tokens: how many they are.
    bytes: of the texts, in UTF-8.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def bits_per_token(self) -> float:
        return self.nats / math.log(2) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean nats per token: to be compared only where the tokens are the same."""
        return math.exp(self.nats / self.tokens)


def evaluate_texts(
    model: LanguageModel,
    tokenizer: PretrainedTokenizer,
    texts: Iterable[str | bytes],
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
) -> TextEvaluation:
    """Each text by itself, in windows (see `effattn_jax.models.scoring.windows`).

    The first token is given the one that opens documents; without such a token it is not counted, though its bytes are.

    Raises:
      ValueError: no token to count; a window or stride out of range.
    """
    opening = [] if tokenizer.bos is None else [tokenizer.bos]
    nats, tokens, size = 0.0, 0, 0
    for text in texts:
        row = [*opening, *tokenizer.encode(text)]
        size += len(text if isinstance(text, bytes) else text.encode())
        if len(row) > 1:
            (found,) = log_probability(model, [row], window=window, stride=stride, batch_size=batch_size)
            nats -= float(np.sum(found, dtype=np.float64))
            tokens += len(found)
    if not tokens:
        checks.fail("texts", "none with a token to predict", "at least one")
    return TextEvaluation(nats, tokens, size)
