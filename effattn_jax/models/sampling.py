"""From scores to the next token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.typing import Array, Float, Int


class Sampling(NamedTuple):
    """How a token is drawn.

    temperature: divides the scores; 0 takes the best token.
    top_k: only the k best tokens can be drawn; None for all.
    top_p: only the smallest set of best tokens with at least this probability (Holtzman et al. 2019, arXiv:1904.09751),
      measured after temperature and top_k; None for all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self, vocab_size: int) -> None:
        if self.temperature < 0:
            checks.fail("temperature", self.temperature, "0 (the best token) or more")
        if self.top_k is not None and not 1 <= self.top_k <= vocab_size:
            checks.fail("top_k", self.top_k, f"None or 1 .. {vocab_size}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            checks.fail("top_p", self.top_p, "None or a probability in (0, 1]")


def filter_scores(scores: Float[Array, "B vocab"], sampling: Sampling) -> Float[Array, "B vocab"]:
    """Scores over temperature, with -inf for tokens that must not be drawn."""
    scores = scores.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None:
        kth = jax.lax.top_k(scores, sampling.top_k)[0][:, -1:]
        scores = jnp.where(scores < kth, -jnp.inf, scores)
    if sampling.top_p is not None:
        ordered = -jnp.sort(-scores, axis=-1)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # mass of the better tokens
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores < least, -jnp.inf, scores)
    return scores


def sample(key: Array, scores: Float[Array, "B vocab"], sampling: Sampling) -> Int[Array, " B"]:
    if sampling.temperature == 0:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filter_scores(scores, sampling), axis=-1).astype(jnp.int32)
