"""A language model inside of a model that sees: its part of the checkpoint is read, and written as its own."""

import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from effattn_jax.pretrained import from_config, load, save
from tests.pretrained.fixture import fixture, header, raw

VISION = (
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "multi_modal_projector.mm_soft_emb_norm.weight",
)


@pytest.fixture(params=["hub", "transformers"])
def whole(request, tmp_path):
    """The text fixture under the names of a Gemma 3 with vision, which are of two kinds."""
    given = fixture("gemma3_text")
    below, vision = {
        "hub": ("language_model.model.", "{}"),
        "transformers": ("model.language_model.", "model.{}"),
    }[request.param]
    tensors = {name.replace("model.", below, 1): x for name, x in load_file(given.path / "model.safetensors").items()}
    tensors |= {vision.format(name): np.ones(3, np.float32) for name in VISION}
    save_file(tensors, tmp_path / "model.safetensors")
    dtype = given.config["dtype"]
    text = {key: value for key, value in given.config.items() if key not in ("dtype", "architectures")}
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "dtype": dtype}
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": text, "vision_config": {}}))
    return tmp_path


@pytest.mark.quick_cases(1)
def test_the_language_model_is_that_of_the_text_checkpoint(whole, tmp_path):
    given = fixture("gemma3_text")
    model = load(whole)
    save(model, tmp_path / "out")
    assert header(tmp_path / "out") == given.tensors
    assert raw(tmp_path / "out") == raw(given.path)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == given.config


def test_what_is_neither_text_nor_vision_is_unknown(whole):
    tensors = load_file(whole / "model.safetensors")
    save_file(tensors | {"audio_tower.weight": np.ones(3, np.float32)}, whole / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensors: got 1 unknown: audio_tower\.weight; needs"):
        load(whole)


def test_a_tensor_under_both_names(whole):
    tensors = load_file(whole / "model.safetensors")
    both = {f"{name}.norm.weight": np.ones(32, np.float32) for name in ("language_model.model", "model.language_model")}
    save_file(tensors | both, whole / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensors: got .*norm\.weight and .*norm\.weight; needs one of the two"):
        load(whole)


def test_from_config_of_the_whole(whole):
    config = json.loads((whole / "config.json").read_text())
    model = nnx.eval_shape(lambda: from_config(config, rngs=nnx.Rngs(0)))
    assert model.source.config["model_type"] == "gemma3_text"
