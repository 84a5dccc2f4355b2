"""Bytes and Hugging Face files: there and back, special tokens, errors."""

import numpy as np
import pytest
import tokenizers

from effattn_jax.training.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer

TEXT = "def f(x):\n\treturn x  # größer, 数学 🙂\r\n"


def save_bpe(path, special_tokens):
    """A byte-level BPE with a tail that would add tokens, and limits that would cut: the file of a real model."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT * 20], trainer)
    first = special_tokens[0]
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, bpe.token_to_id(first))]
    )
    bpe.enable_truncation(4)
    bpe.enable_padding()
    bpe.save(str(path))
    return path


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (258, 256, 257)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert list(ids) == list(TEXT.encode())
    everything = bytes(range(256))
    assert list(tokenizer.encode(everything)) == list(range(256))
    assert tokenizer.decode_bytes([256, *range(256), 257]) == everything
    assert tokenizer.decode([256, *ids, 257]) == TEXT
    assert tokenizer.decode([0xE2, 0x82, 65]) == "\N{REPLACEMENT CHARACTER}A"
    assert tokenizer.encode(b"").shape == (0,)
    assert tokenizer.decode([]) == ""
    for ids in ([258], [-1]):
        with pytest.raises(ValueError, match=r"^ids: got .*; needs token ids from 0 to 257"):
            tokenizer.decode(ids)


def test_hugging_face(tmp_path):
    path = save_bpe(tmp_path / "tokenizer.json", ["<s>", "</s>"])
    tokenizer = load_tokenizer(str(path))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert 4 < len(ids) < len(TEXT.encode())
    assert ids.max() < tokenizer.vocab_size <= 300
    assert tokenizer.bos not in ids
    np.testing.assert_array_equal(tokenizer.encode(TEXT.encode()), ids)
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == TEXT
    assert HuggingFaceTokenizer(tmp_path).vocab_size == tokenizer.vocab_size


def test_a_document_cannot_spell_a_special_token(tmp_path):
    tokenizer = HuggingFaceTokenizer(save_bpe(tmp_path / "tokenizer.json", ["<s>", "</s>"]))
    ids = tokenizer.encode("a</s>b<s>")
    assert not {tokenizer.bos, tokenizer.eos} & set(ids.tolist())
    assert tokenizer.decode(ids) == "a</s>b<s>"


def test_special_tokens_by_name(tmp_path):
    path = save_bpe(tmp_path / "tokenizer.json", ["<|endoftext|>", "<open>", "<close>"])
    tokenizer = HuggingFaceTokenizer(path)
    assert (tokenizer.bos, tokenizer.eos) == (0, 0)
    tokenizer = HuggingFaceTokenizer(path, bos="<open>", eos="<close>")
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    with pytest.raises(ValueError, match=r"^bos: got a vocabulary without <begin>; needs the name of a token"):
        HuggingFaceTokenizer(path, bos="<begin>")


def test_errors_of_files(tmp_path):
    path = save_bpe(tmp_path / "tokenizer.json", ["<open>"])
    with pytest.raises(ValueError, match=r"^bos: got a vocabulary without <s>, "):
        load_tokenizer(str(path))
    with pytest.raises(FileNotFoundError, match=r"^tokenizer: no file .*missing\.json; needs `bytes` or the path"):
        load_tokenizer(str(tmp_path / "missing.json"))
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
        load_tokenizer(str(path))
