"""One pass over held-out documents, in order: every byte a target exactly once, so bits per byte can be compared."""

from collections.abc import Iterator
from itertools import batched

from effattn_jax.checks import fail
from effattn_jax.training.data.packing import Batch, PackedRows, document_tokens, empty_row, stack
from effattn_jax.training.data.pipeline import host_rows
from effattn_jax.training.data.sources import Documents
from effattn_jax.training.data.tokenizer import Tokenizer


def evaluation_documents(source: Documents, max_bytes: int | None = None) -> list[bytes]:
    """The first documents, `max_bytes` in all (or the whole source, where that is less); the last one may be cut."""
    if max_bytes is not None and max_bytes < 1:
        fail("max_bytes", max_bytes, "None or one byte at least")
    documents, room = [], max_bytes
    for index in range(len(source)):
        document = source[index][:room]
        documents.append(document)
        if room is not None:
            room -= len(document)
            if not room:
                break
    return documents


class EvaluationBatches:
    """The batches of `evaluation_batches`; goes over them anew each time it is iterated.

    Attributes:
      documents: what is evaluated.
      byte_count: bytes in them.
    """

    def __init__(
        self, documents: list[bytes], tokenizer: Tokenizer, batch_size: int, sequence_length: int, host: range
    ):
        self.documents = documents
        self.byte_count = sum(map(len, documents))
        self._tokens = [document_tokens(document, tokenizer) for document in documents]
        self._batch_size, self._length, self._host = batch_size, sequence_length, host

    def __len__(self) -> int:
        steps = sum(len(tokens) - 1 for tokens in self._tokens)
        return -(-steps // (self._length * self._batch_size))

    def __iter__(self) -> Iterator[Batch]:
        for rows in batched(PackedRows(self._tokens, self._length), self._batch_size):
            padding = [empty_row(self._length)] * (self._batch_size - len(rows))
            yield stack([*rows, *padding][self._host.start : self._host.stop])


def evaluation_batches(
    source: Documents,
    tokenizer: Tokenizer,
    batch_size: int,
    sequence_length: int,
    max_bytes: int | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> EvaluationBatches:
    """Batches of one pass over `evaluation_documents(source, max_bytes)`, packed in order.

    Each is a dict of int32 [batch_size / process_count, sequence_length], this host's rows of the global batch; what is
    left over in the last one is padding (segment id -1). Every host gets the same number of batches.

    Raises ValueError where process_count does not divide batch_size, or the source is empty.
    """
    host = host_rows(batch_size, process_index, process_count)
    if sequence_length < 1:
        fail("sequence_length", sequence_length, "one token at least")
    documents = evaluation_documents(source, max_bytes)
    if not documents:
        fail("source", "no documents", "one at least")
    return EvaluationBatches(documents, tokenizer, batch_size, sequence_length, host)
