"""Text in pieces: all of it, in order, and never half a character."""

import numpy as np
import pytest

from effattn_jax.pretrained import load_tokenizer
from effattn_jax.pretrained.detokenizer import UNFINISHED, Detokenizer, pieces
from effattn_jax.training.data import ByteTokenizer
from tests.pretrained.tiny_tokenizer import by_bytes, by_pieces, write

TEXT = "hello world, naïve ☃☃ 𝄞日本語 he  wo he\n wo ☃"
TOKENIZERS = {"bytes": by_bytes, "pieces": by_pieces}


@pytest.fixture(params=[*TOKENIZERS, "of the training data"])
def tokenizer(request, tmp_path):
    if request.param not in TOKENIZERS:
        return ByteTokenizer()
    return load_tokenizer(write(tmp_path, TOKENIZERS[request.param](), tokenizer_config={}))


def test_the_pieces_are_the_text(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    parts = list(pieces(Detokenizer(tokenizer.decode), ids))
    assert "".join(parts) == TEXT
    assert len(parts) > len(TEXT) / 2
    assert not any(UNFINISHED in part or part == "" for part in parts)


def test_behind_a_prompt(tokenizer):
    """Wherever the prompt ends, in the middle of a character too: the pieces are what the whole text says more."""
    ids = tokenizer.encode(TEXT).tolist()
    for end in range(1, len(ids)):
        texts = (tokenizer.decode(ids[:n]) for n in range(end, -1, -1))
        said = next(text for text in texts if not text.endswith(UNFINISHED))
        assert said + "".join(pieces(Detokenizer(tokenizer.decode, ids[:end]), ids[end:])) == TEXT


def test_text_comes_as_soon_as_it_is_certain():
    tokenizer = ByteTokenizer()
    detokenizer = Detokenizer(tokenizer.decode)
    said = [detokenizer.add(token) for token in tokenizer.encode("a☃b")]
    assert said == ["a", "", "", "☃", "b"]
    assert detokenizer.finish() == ""


def test_special_tokens_say_nothing(tmp_path):
    """A space in front of a word stays, though a special token lies between it and the word before."""
    tokenizer = load_tokenizer(write(tmp_path, by_pieces(), tokenizer_config={}))
    he, wo = (tokenizer.encode(word)[-1] for word in ("he", "wo"))
    ids = [he, 2, wo, 1, 2, he]
    assert list(pieces(Detokenizer(tokenizer.decode), ids)) == ["he", " wo", " he"]


def test_what_never_becomes_a_character():
    tokenizer = ByteTokenizer()
    assert list(pieces(Detokenizer(tokenizer.decode), [104, 0xE2, 0x98])) == ["h", UNFINISHED]
    noise = np.random.default_rng(0).integers(256, size=200)
    assert "".join(pieces(Detokenizer(tokenizer.decode), noise)) == tokenizer.decode(noise)
