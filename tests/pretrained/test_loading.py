"""Tensors go one by one to their devices, and as many files as there are."""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.pretrained import from_config, load, save
from tests.pretrained.fixture import fixture, header

LARGE = {
    "model_type": "mistral",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "dtype": "float32",
}
EMBEDDING = 4 * 8192 * 512


def same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Eight files or more, about 100 MB."""
    path = tmp_path_factory.mktemp("large") / "model"
    save(from_config(LARGE, rngs=nnx.Rngs(0)), path, shard_bytes=EMBEDDING)
    assert len(list(path.glob("*.safetensors"))) >= 8
    return path


@pytest.mark.slow
def test_the_host_holds_one_tensor_at_a_time(shards):
    run = [sys.executable, "-m", "tests.pretrained.memory_of_loading", str(shards)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    largest = max(4 * math.prod(shape) for shape in header(shards).values())
    assert largest == EMBEDDING
    assert largest <= measured["peak"] <= 1.1 * largest
    assert measured["parameters"] > 3 * largest
    assert measured["on_first_device"] < 1.05 * measured["parameters"] / 8


@pytest.mark.parametrize("name", ["jamba", "mistral_swa"])
@pytest.mark.slow
def test_a_mesh_holds_what_one_device_holds(name):
    """Stacked parameters, experts and convolutions, cut along both axes."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), devices=jax.devices()[:4])
    cut = load(fixture(name).path, mesh=mesh)
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(cut))
    same(load(fixture(name).path), cut)


def test_shards_are_one_file(tmp_path):
    model = load(fixture("mistral_swa").path)
    save(model, tmp_path / "many", shard_bytes=20_000)
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(fixture("mistral_swa").tensors)
    same(model, load(tmp_path / "many"))


@pytest.mark.slow
def test_dtypes(tmp_path):
    """Matrices and computation take what is asked for; rates and norms stay. Saving keeps what is there."""
    model = load(fixture("mamba").path, dtype=jnp.bfloat16)
    state = {".".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(nnx.state(model))}
    assert state["embedding"].dtype == state["units.blocks.0.mixer.out_proj.kernel"].dtype == jnp.bfloat16
    assert state["units.blocks.0.mixer.A_log"].dtype == state["final_norm.scale"].dtype == jnp.float32
    hidden, _ = model.hidden(jnp.zeros((1, 3), jnp.int32))
    assert hidden.dtype == jnp.bfloat16
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    same(model, again)
    assert jax.tree.map(lambda x: x.dtype, nnx.state(model)) == jax.tree.map(lambda x: x.dtype, nnx.state(again))


def test_what_is_trained_here_can_be_saved(tmp_path):
    """A model from a config, its weights changed, comes back as it is."""
    model = from_config(fixture("mamba").config, rngs=nnx.Rngs(1))
    graph, state = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda x: x * 1.5, state))
    save(model, tmp_path / "out")
    assert header(tmp_path / "out") == fixture("mamba").tensors
    same(model, load(tmp_path / "out"))


def test_save_refuses_what_has_no_published_form(tmp_path):
    model = load(fixture("mamba").path)
    model.source = None
    with pytest.raises(ValueError, match=r"^model: got one with no published config"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_save_overwrites_nothing(tmp_path):
    model = load(fixture("mamba").path)
    save(model, tmp_path)
    with pytest.raises(ValueError, match=r"^path: got .*config.json.*; needs an empty directory"):
        save(model, tmp_path)
