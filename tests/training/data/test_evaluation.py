"""One pass: the bytes that were asked for, each a target once, in batches of one shape."""

import numpy as np
import pytest

from effattn_jax.training.data.evaluation import evaluation_batches, evaluation_documents
from effattn_jax.training.data.tokenizer import ByteTokenizer

DOCUMENTS = [b"first", b"", b"the second document, which is longer than a row", bytes(range(256)), b"end"]


@pytest.mark.parametrize("max_bytes", [None, 1, 5, 6, 100, 10_000])
@pytest.mark.parametrize(("batch_size", "length"), [(1, 7), (4, 16), (3, 1000)])
def test_every_byte_is_a_target_once(batch_size, length, max_bytes):
    batches = evaluation_batches(DOCUMENTS, ByteTokenizer(), batch_size, length, max_bytes)
    wanted = b"".join(DOCUMENTS)[:max_bytes]
    assert batches.byte_count == len(wanted)
    for _ in range(2):  # it can be gone over again
        everything = list(batches)
        assert len(everything) == len(batches)
        for batch in everything:
            assert {values.shape for values in batch.values()} == {(batch_size, length)}
        flat = {name: np.concatenate([batch[name].ravel() for batch in everything]) for name in everything[0]}
        real = flat["segment_ids"] >= 0
        targets = flat["targets"][real]
        assert targets[targets < 256].astype(np.uint8).tobytes() == wanted
        assert (targets == 257).sum() == len(evaluation_documents(DOCUMENTS, max_bytes))
        assert not any(flat[name][~real].any() for name in ("inputs", "targets", "positions"))
        assert not real[real.argmin() :].any() or real.all(), "padding before the end"


def test_documents_are_whole_but_the_last():
    assert evaluation_documents(DOCUMENTS) == DOCUMENTS
    assert evaluation_documents(DOCUMENTS, 5) == DOCUMENTS[:1]
    assert evaluation_documents(DOCUMENTS, 8) == [b"first", b"", b"the"]
    assert evaluation_documents(DOCUMENTS, 10**9) == DOCUMENTS


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_batches(hosts):
    whole = list(evaluation_batches(DOCUMENTS, ByteTokenizer(), 4, 16))
    parts = [
        list(evaluation_batches(DOCUMENTS, ByteTokenizer(), 4, 16, process_index=host, process_count=hosts))
        for host in range(hosts)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    for batch, *shares in zip(whole, *parts, strict=True):
        for name, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), values)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"^max_bytes: got 0; needs None or one byte at least"):
        evaluation_documents(DOCUMENTS, 0)
    with pytest.raises(ValueError, match=r"^source: got no documents"):
        evaluation_batches([], ByteTokenizer(), 1, 8)
    with pytest.raises(ValueError, match=r"^process_count: got 2 hosts"):
        evaluation_batches(DOCUMENTS, ByteTokenizer(), 3, 8, process_count=2)
    with pytest.raises(ValueError, match=r"^sequence_length: got 0"):
        evaluation_batches(DOCUMENTS, ByteTokenizer(), 1, 0)
