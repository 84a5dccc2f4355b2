"""Text to batches. The files, each leaning only on those above it:

split           train or validation, from a file's name
stdlib_source   the Python standard library as a TFDS dataset
prepare         prepare a TFDS dataset once, whoever asks
sources         documents by name: the library, a folder, any TFDS text dataset
tokenizer       bytes, or a Hugging Face tokenizer.json
packing         documents in rows of T tokens, with segment ids
pipeline        the training stream: shuffled, shared over hosts, resumed exactly
evaluation      one pass over held-out documents
baselines       byte pairs and lzma, in bits per byte

`PythonStdlib` is not here but in `stdlib_source`: TFDS is slow to import, and most sources do not need it.
"""

from effattn_jax.training.data.baselines import bigram_bits_per_byte, lzma_bits_per_byte
from effattn_jax.training.data.evaluation import EvaluationBatches, evaluation_batches, evaluation_documents
from effattn_jax.training.data.packing import Batch
from effattn_jax.training.data.pipeline import TrainStream
from effattn_jax.training.data.sources import Documents, open_source
from effattn_jax.training.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Documents",
    "EvaluationBatches",
    "HuggingFaceTokenizer",
    "Tokenizer",
    "TrainStream",
    "bigram_bits_per_byte",
    "evaluation_batches",
    "evaluation_documents",
    "load_tokenizer",
    "lzma_bits_per_byte",
    "open_source",
]
