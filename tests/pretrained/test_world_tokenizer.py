"""RWKV's vocabulary, on a small one in its format, against a search over all words."""

import numpy as np
import pytest

from effattn_jax.pretrained import load_tokenizer
from effattn_jax.pretrained.detokenizer import Detokenizer, pieces
from tests.pretrained.tiny_tokenizer import write

WORDS = [
    *(bytes([byte]) for byte in range(256)),
    b"he",
    b"hell",
    b"hello w",
    "☃☃".encode(),
    b" wo",
    b"\xe2\x98",
    b"'x' 3",
]
TEXTS = ["hello world, hell he", "☃☃☃ naïve 日本語", "", "it's 'x' 3 \\ \n"]


@pytest.fixture
def directory(tmp_path):
    """Numbers start at 1; words that are text are written as text, as in the published file."""
    lines = []
    for number, word in enumerate(WORDS, 1):
        try:
            literal = repr(word.decode())
        except UnicodeDecodeError:
            literal = repr(word)
        lines.append(f"{number} {literal} {len(word)}\n")
    (tmp_path / "rwkv_vocab_v0.txt").write_text("".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def tokenizer(directory):
    return load_tokenizer(directory)


def test_the_longest_word_that_fits(tokenizer):
    for text in TEXTS:
        rest, want = text.encode(), []
        while rest:
            word = max((word for word in WORDS if rest.startswith(word)), key=len)
            want.append(WORDS.index(word) + 1)
            rest = rest[len(word) :]
        ids = tokenizer.encode(text)
        assert ids.tolist() == want
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text, special_tokens=True).tolist() == [0, *want]
        assert "".join(pieces(Detokenizer(tokenizer.decode), ids)) == text
    assert tokenizer.encode("hello w")[0] == WORDS.index(b"hello w") + 1


def test_special_tokens(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.stop_tokens) == (len(WORDS) + 1, 0, 0, (0,))
    assert tokenizer.decode([0, *tokenizer.encode("he"), 0]) == "he"


def test_a_chat_template_beside_it(directory):
    (directory / "chat_template.jinja").write_text("User: {{ messages[0].content }}\n\nAssistant:")
    tokenizer = load_tokenizer(directory)
    assert (
        tokenizer.decode(tokenizer.apply_chat_template([{"role": "user", "content": "he"}])) == "User: he\n\nAssistant:"
    )


def test_a_tokenizer_json_counts_first(directory):
    assert load_tokenizer(write(directory)).vocab_size == 266


@pytest.mark.parametrize("line", ["7 'a'", "7 a 1", "x 'a' 1", "7 'a' 2", "7 3 1"])
def test_damaged(directory, line):
    (directory / "rwkv_vocab_v0.txt").write_text(line)
    with pytest.raises(ValueError, match=r"rwkv_vocab_v0\.txt: got the line"):
        load_tokenizer(directory)


def test_bytes_that_are_no_words(directory):
    (directory / "rwkv_vocab_v0.txt").write_text("1 'a' 1\n")
    with pytest.raises(ValueError, match="got no words for the bytes"):
        load_tokenizer(directory)
