"""RWKV as its authors release it: `.pth` files without a config, which the tensors make up for."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from effattn_jax.pretrained import from_config, hub, load, save
from tests.pretrained import pth
from tests.pretrained.fixture import fixture, header, raw

VERSIONS = pytest.mark.parametrize(
    "name", ["rwkv7", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rwkv5", "rwkv6"))]
)
RANKS = {
    "rwkv5": {},
    "rwkv6": {"d_mix_lora": 6, "d_decay_lora": 10},
    "rwkv7": {"d_decay_lora": 8, "d_aaa_lora": 6, "d_mv_lora": 4, "d_gate_lora": 12},
}


def tensors(name):
    return load_file(fixture(name).path / "model.safetensors")


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@VERSIONS
def test_a_file_without_a_config(name, tmp_path):
    model = load(pth.write(tmp_path / "x.pth", tensors(name)))
    assert model.source.config == fixture(name).config | RANKS[name] | {"dtype": "float32"}
    assert_same(model, load(fixture(name).path))


AUTHORS = {
    "rwkv.": "",
    "embeddings.": "emb.",
    "pre_ln": "ln0",
    "attention.": "att.",
    "feed_forward.": "ffn.",
    "mix_key": "mix_k",
    "mix_value": "mix_v",
    "mix_receptance": "mix_r",
}
"""Transformers' names of RWKV-4 -> those of its authors."""


def test_rwkv4_of_its_authors(tmp_path):
    """The same numbers under both names; a `.pth` file is enough, and is written as it was."""
    given = {}
    for name, x in tensors("rwkv4").items():
        for theirs, authors in AUTHORS.items():
            name = name.replace(theirs, authors)
        given[name] = x
    model = load(pth.write(tmp_path / "x.pth", given))
    sizes = {"vocab_size": 64, "n_embd": 32, "dim_att": 32, "dim_ffn": 64, "n_layer": 3}
    assert model.source.config == {"version": "4", **sizes, "dtype": "float32"}
    assert_same(model, load(fixture("rwkv4").path))
    save(model, tmp_path / "out")
    assert raw(tmp_path / "out") == {name: x.tobytes() for name, x in given.items()}


def test_rwkv4_of_other_sizes():
    """An attention as wide as the config says, a head that is the embedding, and what a config leaves out."""
    config = {"model_type": "rwkv", "hidden_size": 32, "vocab_size": 64, "num_hidden_layers": 2}
    make = lambda **more: nnx.eval_shape(lambda: from_config(config | more, rngs=nnx.Rngs(0)))  # noqa: E731
    block = make().units.blocks[0]
    assert block.mixer.k_proj.kernel.shape == (2, 32, 32)
    assert block.mlp.k_proj.kernel.shape == (2, 32, 128)
    model = make(attention_hidden_size=48, intermediate_size=40, tie_word_embeddings=True)
    assert model.units.blocks[0].mixer.k_proj.kernel.shape == (2, 32, 48)
    assert model.units.blocks[0].mixer.u.shape == (2, 48)
    assert model.units.blocks[0].mlp.k_proj.kernel.shape == (2, 32, 40)
    assert model.head is None


@VERSIONS
def test_what_a_config_says_counts(name, tmp_path):
    """A version is enough; what is given beside it wins over the tensors."""
    shutil.copy(fixture(name).path / "model.safetensors", tmp_path)
    config = {"version": fixture(name).config["version"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(load(tmp_path), load(fixture(name).path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    with pytest.raises(ValueError, match=r"unknown: blocks\.2\.att\..*; needs those of model_type 'RWKV-\d'"):
        load(tmp_path)


@pytest.mark.slow
@VERSIONS
def test_bfloat16_is_written_as_safetensors(name, tmp_path):
    """Releases are bfloat16: computed in it, and the same bits under the same names in the other format."""
    given = {key: x.astype(ml_dtypes.bfloat16) for key, x in tensors(name).items()}
    model = load(pth.write(tmp_path / "x.pth", given))
    assert model.dtype == jnp.bfloat16
    save(model, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert header(tmp_path / "out") == {key: x.shape for key, x in given.items()}
    assert raw(tmp_path / "out") == {key: x.tobytes() for key, x in given.items()}
    assert_same(model, load(tmp_path / "out"))


@pytest.mark.slow
def test_tensors_of_the_first_layer_without_effect(tmp_path):
    """v0, v1, v2 of layer 0, even of a rank of their own: not read, not written."""
    extra = {
        f"blocks.0.att.v{i}": np.full(shape, np.nan, np.float32)
        for i, shape in enumerate([(1, 1, 48), (48, 9), (9, 48)])
    }
    model = load(pth.write(tmp_path / "x.pth", extra | tensors("rwkv7")))
    assert_same(model, load(fixture("rwkv7").path))
    save(model, tmp_path / "out")
    assert header(tmp_path / "out") == fixture("rwkv7").tensors


@pytest.mark.slow
def test_a_tensor_that_lies_turned(tmp_path):
    """Column by column, and one number for all channels."""
    given = tensors("rwkv7")
    key, row = "blocks.1.att.key.weight", "blocks.2.att.x_k"
    given[row] = np.full_like(given[row], 0.25)
    items, data = {}, []
    for i, (name, x) in enumerate(given.items()):
        kept = {key: x.T, row: x[..., :1]}.get(name, x)
        strides = {key: (1, 48), row: (0, 0, 0)}.get(name, pth.strides(x.shape))
        items[name] = pth.tensor(pth.storage("FloatStorage", str(i), kept.size), 0, x.shape, strides)
        data.append(np.ascontiguousarray(kept))
    turned = load(pth.archive(tmp_path / "turned.pth", pth.pickle(pth.dictionary(items)), data))
    assert_same(turned, load(pth.write(tmp_path / "x.pth", given)))


def test_other_tensors_without_a_use_are_refused(tmp_path):
    extra = {"blocks.0.att.v3": np.zeros(1, np.float32), "blocks.1.att.e0": np.zeros(1, np.float32)}
    with pytest.raises(ValueError, match=r"2 unknown: blocks\.0\.att\.v3, blocks\.1\.att\.e0; needs"):
        load(pth.write(tmp_path / "x.pth", tensors("rwkv7") | extra))


@pytest.mark.parametrize(
    ("name", "missing"), [("rwkv5", "att.time_decay"), ("rwkv6", "att.time_maa_w2"), ("rwkv7", "att.w1")]
)
def test_a_missing_tensor(name, missing, tmp_path):
    """Its size is known from the other layers."""
    given = tensors(name)
    del given[f"blocks.1.{missing}"]
    with pytest.raises(ValueError, match=rf"tensors: got 1 missing: blocks\.1\.{missing}; needs those of model_type"):
        load(pth.write(tmp_path / "x.pth", given))


@pytest.mark.parametrize(("lost", "needed"), [("emb.weight", "emb.weight"), ("ffn.key.weight", "ffn.key.weight")])
def test_a_size_that_no_tensor_has(lost, needed, tmp_path):
    given = {key: x for key, x in tensors("rwkv7").items() if not key.endswith(lost)}
    with pytest.raises(ValueError, match=f"tensors: got no {needed} of . dimensions; needs those of RWKV-7"):
        load(pth.write(tmp_path / "x.pth", given))


def test_a_file_of_another_model(tmp_path):
    with pytest.raises(
        ValueError, match=r"got a\.weight, \.\.\.; needs those of RWKV-4, RWKV-5, RWKV-6, RWKV-7, or a config"
    ):
        load(pth.write(tmp_path / "x.pth", {"a.weight": np.zeros(3, np.float32)}))


def test_numbers_of_another_kind(tmp_path):
    given = tensors("rwkv7")
    given["blocks.1.att.x_k"] = given["blocks.1.att.x_k"].astype(np.int8)
    with pytest.raises(ValueError, match=r"dtypes blocks\.1\.att\.x_k I8; needs one of"):
        load(pth.write(tmp_path / "x.pth", given))


@pytest.mark.slow
def test_one_layer(tmp_path):
    """No layer mixes in values of the first."""
    given = {key: x for key, x in tensors("rwkv7").items() if not key.startswith(("blocks.1.", "blocks.2."))}
    model = load(pth.write(tmp_path / "x.pth", given))
    logits, _ = model(jnp.asarray(fixture("rwkv7").io["input_ids"][:1, :5]))
    assert np.isfinite(logits).all()
    save(model, tmp_path / "out")
    assert header(tmp_path / "out") == {key: x.shape for key, x in given.items()}


def test_random_weights_from_a_version_and_sizes():
    config = fixture("rwkv7").config
    model = nnx.eval_shape(lambda: from_config(config | {"d_gate_lora": 5}, rngs=nnx.Rngs(0)))
    mixer = model.units.blocks[0].mixer
    assert mixer.g_proj.down.kernel.shape == (3, 48, 5)
    assert mixer.w_proj.down.kernel.shape == (3, 48, 32)  # the layer's default


def test_an_unknown_version():
    with pytest.raises(ValueError, match="model_type: got 'RWKV-9'; needs one of RWKV-4, "):
        from_config({"version": 9}, rngs=nnx.Rngs(0))


def test_a_file_of_a_repository(tmp_path, monkeypatch):
    path = pth.write(tmp_path / "x.pth", tensors("rwkv5"))
    asked = []
    monkeypatch.setattr(hub, "hf_hub_download", lambda *names: asked.append(names) or str(path))
    assert load("author/name/below/x.pth").source.config["version"] == "5"
    assert asked == [("author/name", "below/x.pth")]


def test_a_file_that_cannot_be_fetched(monkeypatch):
    def offline(*names):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"'author/name/x\.pth', which is no file here, and the hub cannot be reached"):
        load("author/name/x.pth")
    with pytest.raises(ValueError, match=r"got 'nowhere\.pth'; needs a file that is there"):
        load("nowhere.pth")


@pytest.mark.slow
def test_shards(tmp_path):
    """A layer's tensors in two files."""
    given = tensors("rwkv6")
    names = sorted(given)
    shards = {f"model-{i}.safetensors": names[i::2] for i in range(2)}
    for shard, own in shards.items():
        save_file({key: given[key] for key in own}, tmp_path / shard)
    index = {"weight_map": {key: shard for shard, own in shards.items() for key in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"version": 6}')
    assert_same(load(tmp_path), load(fixture("rwkv6").path))
