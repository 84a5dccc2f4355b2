"""Text to token ids and back: bytes, or a Hugging Face `tokenizer.json`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int

from effattn_jax.checks import ArgumentError, fail

Ids = Int[np.ndarray, " n"]  # int32

BEGIN_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<|endoftext|>")
END_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]")


class Tokenizer(Protocol):
    """`bos` opens a document and `eos` closes it; `encode` adds neither, `decode` drops both."""

    vocab_size: int
    bos: int
    eos: int

    def encode(self, text: bytes | str) -> Ids: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes: ids 0 to 255 are the bytes, 256 opens a document, 257 closes it."""

    vocab_size = 258
    bos = 256
    eos = 257

    def encode(self, text: bytes | str) -> Ids:
        return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        array = np.asarray(list(ids), np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            fail("ids", f"{array.min()} to {array.max()}", f"token ids from 0 to {self.vocab_size - 1}")
        return array[array < self.bos].astype(np.uint8).tobytes()

    def decode(self, ids: Iterable[int]) -> str:
        """The text, with U+FFFD where the bytes are no UTF-8."""
        return self.decode_bytes(ids).decode(errors="replace")


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library.

    Args:
      path: the file, or a folder that holds a `tokenizer.json`.
      bos, eos: the special tokens by name; None looks for the common names (`BEGIN_NAMES`, `END_NAMES`).

    Special tokens spelled out in a document are encoded as ordinary text. Bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(self, path: str | Path, bos: str | None = None, eos: str | None = None):
        import tokenizers

        path = Path(path).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer: no file {path}; needs `bytes` or the path of a tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ArgumentError(f"tokenizer: {path} is no tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos = self._special("bos", BEGIN_NAMES if bos is None else (bos,))
        self.eos = self._special("eos", END_NAMES if eos is None else (eos,))

    def _special(self, argument: str, names: tuple[str, ...]) -> int:
        ids = [token for name in names if (token := self._tokenizer.token_to_id(name)) is not None]
        if not ids:
            fail(argument, f"a vocabulary without {', '.join(names)}", "the name of a token of this tokenizer")
        return ids[0]

    def encode(self, text: bytes | str) -> Ids:
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids if token not in (self.bos, self.eos)])


def load_tokenizer(spec: str) -> Tokenizer:
    """ "bytes", or the path of a Hugging Face `tokenizer.json`."""
    return ByteTokenizer() if spec == "bytes" else HuggingFaceTokenizer(spec)
