"""Packing: documents one after another in rows of exactly T tokens, a segment id for each.

A document b_1 … b_n is n + 1 steps, with inputs [bos, b_1 … b_n] and targets [b_1 … b_n, eos], so every token is
a target exactly once. A document that does not fit goes on in the next row as a segment of its own; nothing is lost
or repeated.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int

from effattn_jax.training.data.tokenizer import Ids, Tokenizer

Batch = dict[str, Int[np.ndarray, "R T"]]  # int32: inputs, targets, segment_ids (-1 is padding), positions
Row = dict[str, Int[np.ndarray, " T"]]


class TokenDocuments(Protocol):
    """Documents as `document_tokens`, by index; of sys.maxsize of them where they repeat for ever."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Ids: ...


def document_tokens(document: bytes, tokenizer: Tokenizer) -> Ids:
    """[bos, b_1 … b_n, eos]."""
    return np.concatenate(([tokenizer.bos], tokenizer.encode(document), [tokenizer.eos])).astype(np.int32)


def empty_row(length: int) -> Row:
    """A row of nothing but padding."""
    row = {name: np.zeros(length, np.int32) for name in ("inputs", "targets", "segment_ids", "positions")}
    row["segment_ids"] -= 1
    return row


def stack(rows: Sequence[Row]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class PackedRows:
    """An iterator over the rows of `length` tokens; the last one is padded.

    `document` and `offset` say which step comes next, and are all there is to its state.
    """

    def __init__(self, documents: TokenDocuments, length: int):
        self.documents = documents
        self.length = length
        self.seek(0, 0)

    def seek(self, document: int, offset: int) -> None:
        self.document, self.offset = document, offset
        self._tokens: Ids | None = None  # of the document, once it is read

    def __iter__(self) -> "PackedRows":
        return self

    def __next__(self) -> Row:
        row, filled, segment = empty_row(self.length), 0, 0
        while filled < self.length and self.document < len(self.documents):
            if self._tokens is None:
                self._tokens = self.documents[self.document]
            start, steps = self.offset, len(self._tokens) - 1
            stop = min(steps, start + self.length - filled)
            piece = slice(filled, filled + stop - start)
            row["inputs"][piece] = self._tokens[start:stop]
            row["targets"][piece] = self._tokens[start + 1 : stop + 1]
            row["segment_ids"][piece] = segment
            row["positions"][piece] = np.arange(stop - start)
            filled, segment, self.offset = piece.stop, segment + 1, stop
            if stop == steps:
                self.seek(self.document + 1, 0)
        if not filled:
            raise StopIteration
        return row
