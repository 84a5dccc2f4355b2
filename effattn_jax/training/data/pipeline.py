"""The training stream: shuffled, packed, shared out over hosts, resumed exactly.

Of R rows of the global batch, row r reads documents r, r + R, r + 2R, … of an order that is shuffled anew in every
epoch, and each host makes its own rows. So the global batch is the same for any number of hosts, and the state is two
numbers a row: which document comes next, and which step of it.
"""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import grain

from effattn_jax.checks import fail
from effattn_jax.training.data.packing import Batch, PackedRows, TokenDocuments, document_tokens, stack
from effattn_jax.training.data.sources import Documents
from effattn_jax.training.data.tokenizer import Tokenizer


def host_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of the global batch that a host makes."""
    if process_count < 1 or batch_size < 1 or batch_size % process_count:
        fail("process_count", f"{process_count} hosts", f"a number that divides batch_size = {batch_size}")
    if not 0 <= process_index < process_count:
        fail("process_index", process_index, f"a host from 0 to {process_count - 1}")
    rows = batch_size // process_count
    return range(process_index * rows, (process_index + 1) * rows)


Next = list[list[int]]  # [document, step] of each row


class _Batches:
    """The next row of each stream of documents, stacked."""

    def __init__(self, documents: Sequence[TokenDocuments], sequence_length: int):
        self._rows = [PackedRows(stream, sequence_length) for stream in documents]

    def make(self) -> tuple[Batch, Next]:
        """A batch, and what comes after it."""
        batch = stack([next(row) for row in self._rows])
        return batch, [[row.document, row.offset] for row in self._rows]

    def seek(self, following: Next) -> None:
        for row, (document, offset) in zip(self._rows, following, strict=True):
            row.seek(document, offset)


class TrainStream:
    """An endless iterator over this host's part of the training batches.

    Args:
      source: the documents.
      tokenizer: turns each into ids.
      batch_size: rows of the global batch, over all hosts.
      sequence_length: tokens of a row, T.
      seed: of the shuffle, 0 to 2**32 - 1.
      process_index, process_count: this host, and how many there are.
      prefetch: batches made ahead in a background thread.

    `next` gives a dict of int32 [batch_size / process_count, T]: "inputs", "targets", "segment_ids", "positions".
    `get_state` and `set_state` are what `grain.checkpoint.CheckpointSave` and `CheckpointRestore` call; the state
    counts the batches that were handed out, not those made ahead. Where reading a document fails, `next` raises what
    the source raised, and the next call tries the same batch again.

    Raises:
      ValueError: hosts that do not divide the rows, fewer documents than rows, or the state of another stream.
    """

    def __init__(
        self,
        source: Documents,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        sequence_length: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
    ):
        rows = host_rows(batch_size, process_index, process_count)
        if sequence_length < 1 or prefetch < 0:
            fail("sequence_length, prefetch", f"{sequence_length}, {prefetch}", "one token, and no batch, at least")
        if len(source) < batch_size:
            fail("source", f"{len(source)} documents", f"one at least for each of the {batch_size} rows of a batch")
        shuffled = grain.MapDataset.source(source).shuffle(seed)
        tokenize = partial(document_tokens, tokenizer=tokenizer)
        documents = [shuffled[row::batch_size].repeat().map(tokenize) for row in rows]
        self._identity = {
            "source": getattr(source, "fingerprint", ""),
            "documents": len(source),
            "vocab_size": tokenizer.vocab_size,
            "batch_size": batch_size,
            "rows": [rows.start, rows.stop],
            "sequence_length": sequence_length,
            "seed": seed,
        }
        self._batches = _Batches(documents, sequence_length)
        self._next: Next = [[0, 0] for _ in rows]
        self._prefetch = prefetch
        self._ahead: deque[Future[tuple[Batch, Next]]] = deque()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="train_stream")

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._make_ahead(self._prefetch + 1)
        try:
            batch, self._next = self._ahead[0].result()
        except BaseException:
            self._seek(self._next)
            raise
        self._ahead.popleft()
        return batch

    def start_prefetch(self) -> None:
        self._make_ahead(self._prefetch)

    def get_state(self) -> bytes:
        """JSON: which stream this is, and [document, step] of each row's next token."""
        return json.dumps({"stream": self._identity, "next": self._next}).encode()

    def set_state(self, state: bytes) -> None:
        saved = json.loads(state)
        for name, value in self._identity.items():
            if (was := saved["stream"].get(name)) != value:
                fail("state", f"one saved with {name} = {was}", f"{name} = {value}, as in this stream")
        self._seek(saved["next"])

    def _make_ahead(self, count: int) -> None:
        while len(self._ahead) < count:
            self._ahead.append(self._worker.submit(self._batches.make))

    def _seek(self, following: Next) -> None:
        for batch in self._ahead:
            batch.cancel()
        wait(self._ahead)
        self._ahead.clear()
        self._next = following
        self._batches.seek(following)
