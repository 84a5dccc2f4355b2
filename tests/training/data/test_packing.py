"""Rows against plain lists: every token a target once, segments and positions by counting."""

import numpy as np
import pytest

from effattn_jax.training.data.packing import PackedRows, document_tokens, empty_row, stack
from effattn_jax.training.data.tokenizer import ByteTokenizer

LENGTHS = [0, 1, 5, 40, 0, 3, 7, 8, 100, 2, 0]


def documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, length).astype(np.uint8).tobytes() for length in lengths]


def packed_slowly(texts, length):
    """(input, target, segment, position) of each step, row by row, one step at a time."""
    rows, row, segment = [], [], 0
    for text in texts:
        position = 0
        for step in zip([256, *text], [*text, 257], strict=True):
            row.append((*step, segment, position))
            position += 1
            if len(row) == length:
                rows.append(row)
                row, segment, position = [], 0, 0
        segment = segment + 1 if row else 0
    if row:
        rows.append(row + [(0, 0, -1, 0)] * (length - len(row)))
    return np.array(rows, np.int32).transpose(2, 0, 1)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 64, 500])
def test_rows_are_the_documents_in_order(length):
    texts = documents(LENGTHS)
    tokens = [document_tokens(text, ByteTokenizer()) for text in texts]
    batch = stack(list(PackedRows(tokens, length)))
    wanted = packed_slowly(texts, length)
    for name, values in zip(("inputs", "targets", "segment_ids", "positions"), wanted, strict=True):
        assert batch[name].dtype == np.int32
        np.testing.assert_array_equal(batch[name], values, err_msg=name)


def test_a_row_by_hand():
    tokens = [document_tokens(text, ByteTokenizer()) for text in (b"ab", b"", b"cde")]
    first, second = PackedRows(tokens, 5)
    assert first["inputs"].tolist() == [256, 97, 98, 256, 256]
    assert first["targets"].tolist() == [97, 98, 257, 257, 99]
    assert first["segment_ids"].tolist() == [0, 0, 0, 1, 2]
    assert first["positions"].tolist() == [0, 1, 2, 0, 0]
    assert second["inputs"].tolist() == [99, 100, 101, 0, 0]
    assert second["targets"].tolist() == [100, 101, 257, 0, 0]
    assert second["segment_ids"].tolist() == [0, 0, 0, -1, -1]
    assert second["positions"].tolist() == [0, 1, 2, 0, 0]


@pytest.mark.parametrize("length", [3, 8, 33])
def test_seek_goes_on_where_it_stood(length):
    tokens = [document_tokens(text, ByteTokenizer()) for text in documents(LENGTHS)]
    rows = PackedRows(tokens, length)
    places, everything = [], []
    for _ in range(10):
        places.append((rows.document, rows.offset))
        everything.append(next(rows, empty_row(length)))
    for count, place in enumerate(places):
        other = PackedRows(tokens, length)
        other.seek(*place)
        for row in everything[count:]:
            for name, values in next(other, empty_row(length)).items():
                np.testing.assert_array_equal(values, row[name])
