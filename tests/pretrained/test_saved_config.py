"""config.json as `save` writes it: the given one, with the dtype that the matrices have."""

import json

import jax.numpy as jnp
import pytest
from flax import nnx

from effattn_jax.pretrained import from_config, load, save
from tests.pretrained.fixture import fixture

PLAIN = {key: value for key, value in fixture("mistral_swa").config.items() if key != "dtype"}


def saved(model, path):
    save(model, path)
    return json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("named", [{"torch_dtype": "bfloat16"}, {}], ids=str)
def test_a_reader_that_takes_the_named_dtype_rounds_nothing(named, tmp_path):
    """Parameters made here are float32, whatever they were published in."""
    model = from_config(PLAIN | named, rngs=nnx.Rngs(0))
    assert saved(model, tmp_path / "out") == PLAIN | dict.fromkeys(named, "float32")


def test_matrices_read_as_bfloat16_are_named_so(tmp_path):
    model = load(fixture("mistral_swa").path, dtype=jnp.bfloat16)
    assert saved(model, tmp_path / "out") == PLAIN | {"dtype": "bfloat16"}


def test_what_was_read_has_its_config_back(tmp_path):
    assert saved(load(fixture("mistral_swa").path), tmp_path / "out") == fixture("mistral_swa").config
