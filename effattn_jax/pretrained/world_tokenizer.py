"""RWKV's vocabulary of many languages: the longest word that fits, byte by byte."""

import ast
import collections
import pathlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from effattn_jax import checks
from effattn_jax.pretrained.tokenizer import PretrainedTokenizer, templates

END = 0  # opens and closes documents; no word has it


class WorldTokenizer(PretrainedTokenizer):
    """Of a file `rwkv_vocab_*.txt`: a line has a token's number, the word as a Python literal, and its length in bytes.

    A text is cut from its beginning on: each token is the longest word that the rest begins with.

    Args:
      path: the file; a chat template may lie beside it.

    Raises:
      ValueError: a line of another form; a byte that is no word.
    """

    def __init__(self, path: pathlib.Path):
        words = dict(_word(path.name, line) for line in path.read_text(encoding="utf-8").split("\n") if line)
        missing = {bytes([byte]) for byte in range(256)} - set(words.values())
        if missing:
            checks.fail(path.name, f"no words for the bytes {sorted(missing)}", "all 256")
        self._words = words
        self._by_start: dict[bytes, list[tuple[bytes, int]]] = collections.defaultdict(list)
        for token, word in sorted(words.items(), key=lambda item: -len(item[1])):
            self._by_start[word[:2]].append((word, token))
        self.vocab_size = max(words) + 1
        self.special_tokens, self._templates = {}, templates(path.parent, {})
        self.bos, self.eos, self.stop_tokens = END, END, (END,)

    def encode(self, text: bytes | str, *, special_tokens: bool = False) -> Int[np.ndarray, " n"]:
        """Tokens of a text; with `special_tokens` behind the one that opens documents."""
        rest = text.encode() if isinstance(text, str) else text
        ids, place = [END] if special_tokens else [], 0
        while place < len(rest):
            start = rest[place : place + 2]
            fitting = (*self._by_start.get(start, ()), *self._by_start.get(start[:1], ()))
            word, token = next((word, token) for word, token in fitting if rest.startswith(word, place))
            ids.append(token)
            place += len(word)
        return np.asarray(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._words.get(int(token), b"") for token in ids).decode(errors="replace")


def _word(file: str, line: str) -> tuple[int, bytes]:
    number, _, rest = line.partition(" ")
    literal, _, length = rest.rpartition(" ")
    try:
        word = ast.literal_eval(literal)
        word = word.encode() if isinstance(word, str) else word
        if not isinstance(word, bytes) or len(word) != int(length):
            raise ValueError(literal)
        return int(number), word
    except (ValueError, SyntaxError):
        checks.fail(file, f"the line {line!r}", "a number, a Python literal and its length in bytes")
