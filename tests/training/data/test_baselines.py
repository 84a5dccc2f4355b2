"""The bigram against a dictionary, lzma against its definition."""

import lzma
import math
from collections import Counter

import numpy as np
import pytest

from effattn_jax.training.data import baselines
from effattn_jax.training.data.baselines import bigram_bits_per_byte, lzma_bits_per_byte


def documents(seed, count, alphabet=256):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, alphabet, rng.integers(0, 40)).astype(np.uint8).tobytes() for _ in range(count)]


def pairs(texts):
    return [pair for text in texts for pair in zip([None, *text], text, strict=False)]


def slow_bits(train, heldout, alpha):
    count, context = Counter(pairs(train)), Counter(previous for previous, _ in pairs(train))
    return [-math.log2((count[p] + alpha) / (context[p[0]] + 256 * alpha)) for p in pairs(heldout)]


@pytest.mark.parametrize("alphabet", [3, 40, 256])
def test_bigram_is_the_dictionarys(alphabet, monkeypatch):
    train, heldout = documents(0, 60, alphabet), documents(1, 20, alphabet)
    monkeypatch.setattr(baselines, "ALPHAS", [0.3])
    wanted = np.mean(slow_bits(train, heldout, 0.3))
    assert bigram_bits_per_byte(train, heldout) == pytest.approx(wanted, rel=1e-12)
    monkeypatch.setattr(baselines._groups, "__defaults__", (7,))  # many groups
    assert bigram_bits_per_byte(train, heldout) == pytest.approx(wanted, rel=1e-12)


def test_alpha_is_the_one_that_suits_training_bytes_left_out():
    train, heldout = documents(0, 60, 5), documents(1, 20, 5)
    flat = [(index, pair) for index, pair in enumerate(pairs(train))]
    count, context = Counter(pair for _, pair in flat), Counter(pair[0] for _, pair in flat)

    def left_out(alpha):
        return sum(-math.log2((count[p] - 1 + alpha) / (context[p[0]] - 1 + 256 * alpha)) for _, p in flat)

    alpha = min(baselines.ALPHAS, key=left_out)
    assert bigram_bits_per_byte(train, heldout) == pytest.approx(np.mean(slow_bits(train, heldout, alpha)), rel=1e-12)


def test_bigram_of_what_it_can_and_cannot_predict():
    assert bigram_bits_per_byte([b"ab" * 5000], [b"ab" * 50]) < 0.01
    noise = np.random.default_rng(0).integers(0, 256, 200_000).astype(np.uint8).tobytes()
    assert 7.9 < bigram_bits_per_byte([noise[:100_000]], [noise[100_000:]]) < 8.1


def test_lzma():
    text = [b"hello " * 100, b"world"]
    packed = lzma.compress(b"".join(text), format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    assert lzma_bits_per_byte(text) == 8 * len(packed) / 605


def test_no_bytes_is_an_error():
    with pytest.raises(ValueError, match=r"^train_documents: got no bytes"):
        bigram_bits_per_byte([b""], [b"a"])
    with pytest.raises(ValueError, match=r"^heldout_documents: got no bytes"):
        bigram_bits_per_byte([b"a"], [])
    with pytest.raises(ValueError, match=r"^heldout_documents: got no bytes"):
        lzma_bits_per_byte([b""])
