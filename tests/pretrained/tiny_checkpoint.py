"""A checkpoint of random weights with a tokenizer, as a directory."""

import functools
import pathlib
import tempfile

from flax import nnx

from effattn_jax.pretrained import from_config, save
from tests.layers.catalogue import filled
from tests.pretrained.tiny_tokenizer import write

CONFIG = {
    "model_type": "mistral",
    "dtype": "float32",
    "vocab_size": 272,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
}


@functools.cache
def saved() -> dict[str, bytes]:
    """Files of the model, written once."""
    with tempfile.TemporaryDirectory() as directory:
        save(filled(lambda: from_config(CONFIG, rngs=nnx.Rngs(0))), directory)
        return {file.name: file.read_bytes() for file in pathlib.Path(directory).iterdir()}


def checkpoint(directory: pathlib.Path, *, tokenizer: bool = True, **files) -> pathlib.Path:
    """Written to `directory`; `files` as for `tiny_tokenizer.write`."""
    for name, content in saved().items():
        (directory / name).write_bytes(content)
    return write(directory, **files) if tokenizer else directory
