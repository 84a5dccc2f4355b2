"""What a model has to beat, in bits per held-out byte: counts of byte pairs, and a compressor."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from effattn_jax.checks import fail

BYTES = 256
START = 256  # the context of a document's first byte
CONTEXTS = 257
ALPHAS = 10.0 ** np.arange(-4, 1.25, 0.25)

Counts = Int[np.ndarray, "contexts bytes"]


def bigram_bits_per_byte(train_documents: Iterable[bytes], heldout_documents: Sequence[bytes]) -> float:
    """The mean of -log2 p(b_t | b_{t-1}) over the held-out bytes, where the first byte of a document follows `START`.

    With n(c, b) counted in training, p(b | c) = (n(c, b) + α) / (n(c) + 256 α). Of `ALPHAS`, α is the one under which
    the training bytes, each given all the others, are likeliest. Raises ValueError where there are no bytes.
    """
    train, heldout = pair_counts(train_documents), pair_counts(heldout_documents)
    for argument, counts in (("train_documents", train), ("heldout_documents", heldout)):
        if not counts.any():
            fail(argument, "no bytes", "one at least")
    alpha = min(ALPHAS, key=lambda a: _bits(train, train, a, left_out=1))
    return _bits(train, heldout, alpha, left_out=0) / int(heldout.sum())


def _bits(train: Counts, coded: Counts, alpha: float, left_out: int) -> float:
    """Bits of the `coded` pairs. With `left_out` = 1 those are the training pairs, each coded without itself."""
    seen = coded > 0
    pairs = (train - left_out + alpha)[seen]
    contexts = (train.sum(1, keepdims=True) - left_out + BYTES * alpha).repeat(BYTES, 1)[seen]
    return float((coded[seen] * np.log2(contexts / pairs)).sum())


def pair_counts(documents: Iterable[bytes]) -> Counts:
    """n(c, b): how often byte b follows context c, a byte or START."""
    counts = np.zeros(CONTEXTS * BYTES, np.int64)
    for group in _groups(documents):
        text = np.frombuffer(b"".join(group), np.uint8)
        contexts = np.empty(text.size, np.int32)
        contexts[1:] = text[:-1]
        contexts[np.cumsum([0] + [len(document) for document in group[:-1]])] = START
        counts += np.bincount(contexts * BYTES + text, minlength=counts.size)
    return counts.reshape(CONTEXTS, BYTES)


def _groups(documents: Iterable[bytes], size: int = 1 << 22) -> Iterator[list[bytes]]:
    """Documents that are not empty, some megabytes at a time: few calls to numpy, little memory."""
    group, total = [], 0
    for document in documents:
        if document:
            group.append(document)
            total += len(document)
        if total >= size:
            yield group
            group, total = [], 0
    if group:
        yield group


def lzma_bits_per_byte(heldout_documents: Iterable[bytes]) -> float:
    """Bits of the xz file (preset 9, extreme) of all held-out documents in one, a byte of them. No training text."""
    import lzma  # some builds of Python lack it

    text = b"".join(heldout_documents)
    if not text:
        fail("heldout_documents", "no bytes", "one at least")
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
