"""Drawing tokens against loops in numpy and against the frequencies they promise."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.models import Sampling
from effattn_jax.models.sampling import filter_scores, sample
from tests.layers.catalogue import random

VOCAB = 12


def allowed(scores, sampling):
    """Tokens that may be drawn, one after the other from the best; equal scores stand or fall together."""
    scores = np.asarray(scores, np.float64) / sampling.temperature
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept = set(order)
    if sampling.top_k is not None:
        least = scores[order[sampling.top_k - 1]]
        kept = {i for i in kept if scores[i] >= least}
    if sampling.top_p is not None:
        weights = {i: np.exp(scores[i] - scores.max()) for i in kept}
        total, mass, least = sum(weights.values()), 0.0, np.inf
        for i in (i for i in order if i in kept):
            if mass >= sampling.top_p:
                break
            mass, least = mass + weights[i] / total, scores[i]
        kept = {i for i in kept if scores[i] >= least}
    return kept


ROWS = {
    "random": 2 * random("scores", VOCAB),
    "flat": np.zeros(VOCAB, np.float32),
    "ties": np.float32([1, 3, 3, 0, 3, 2, 2, 1, 0, -1, -1, 3]),
    "one": np.float32([0] * 5 + [50] + [0] * 6),
    "forbidden": np.float32([1, 2, -np.inf, 3, 0, -np.inf, 2, 1, 0, 1, 2, 0]),
}


@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.62, 0.97])
@pytest.mark.parametrize("top_k", [None, 1, 3, 5, VOCAB])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_filter(temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)
    got = np.asarray(filter_scores(jnp.asarray(np.stack([*ROWS.values()])), sampling))
    for (name, scores), row in zip(ROWS.items(), got, strict=True):
        kept = allowed(scores, sampling) - set(np.flatnonzero(np.isneginf(scores)))
        assert set(np.flatnonzero(row > -np.inf)) == kept, name
        np.testing.assert_allclose(row[sorted(kept)], scores[sorted(kept)] / temperature, rtol=1e-6)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_k=4), Sampling(1.5, top_p=0.8)], ids=str)
def test_frequencies(sampling):
    """Pearson's statistic of 20,000 draws stays below a bound that chance passes once in a million."""
    draws, scores = 20_000, ROWS["random"]
    tokens = sample(jax.random.key(0), jnp.tile(scores, (draws, 1)), sampling)
    counts = np.bincount(tokens, minlength=VOCAB)
    kept = sorted(allowed(scores, sampling))
    weights = np.exp(np.float64(scores[kept]) / sampling.temperature)
    expected = draws * weights / weights.sum()
    assert counts.sum() == counts[kept].sum() == draws
    assert np.sum((counts[kept] - expected) ** 2 / expected) < 50


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(0, top_k=5), Sampling(1, top_k=1), Sampling(9, top_p=1e-9)])
def test_greedy(sampling):
    scores = jnp.asarray(random("many", 64, VOCAB))
    tokens = sample(jax.random.key(1), scores, sampling)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, np.argmax(scores, axis=-1))


WRONG = [
    ("temperature: got -0.1", Sampling(-0.1)),
    ("top_k: got 0", Sampling(top_k=0)),
    ("top_k: got 13", Sampling(top_k=13)),
    ("top_p: got 0", Sampling(top_p=0)),
    ("top_p: got 1.1", Sampling(top_p=1.1)),
]


@pytest.mark.parametrize(("message", "sampling"), WRONG, ids=[message for message, _ in WRONG])
def test_errors(message, sampling):
    with pytest.raises(ValueError, match=re.escape(message)):
        sampling.check(VOCAB)
