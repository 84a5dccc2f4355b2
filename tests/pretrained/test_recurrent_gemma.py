"""RecurrentGemma under the two names that its tensors have: Google's and transformers'."""

import pytest
from flax import nnx

from effattn_jax.pretrained import from_config
from effattn_jax.pretrained.build import kind_of
from tests.pretrained.fixture import fixture


def made(name="recurrentgemma_official", **changed):
    config = fixture(name).config | changed
    return nnx.eval_shape(lambda: from_config({k: v for k, v in config.items() if v is not ...}, rngs=nnx.Rngs(0)))


def attention(model):
    (found,) = [block.mixer for _, block in model.parts() if hasattr(block.mixer, "window")]
    return found


def test_google_counts_the_window_without_the_current_token():
    assert attention(made(attention_window_size=8)).window == 9
    assert attention(made("recurrent_gemma", attention_window_size=8)).window == 8


def test_what_a_config_leaves_out():
    model = made(lru_width=..., conv1d_temporal_width=..., logits_soft_cap=0.0, embeddings_scale_by_sqrt_dim=False)
    mixer = next(block.mixer for _, block in model.parts())
    assert mixer.x_proj.kernel.shape[-2:] == (32, 32)
    assert mixer.conv.taps.shape[-2:] == (4, 32)
    assert model.logits_soft_cap is None
    assert model.embedding_scale == 1
    assert made(width=64).embedding_scale == 8
    assert made(width=48).embedding_scale == 6.9375  # sqrt(48) in bfloat16


def test_fields_tell_the_family_only_without_a_model_type():
    config = fixture("recurrentgemma_official").config
    assert kind_of(config) == "griffin"
    assert kind_of(config | {"model_type": "other"}) == "other"
    del config["mlp_expanded_width"]
    with pytest.raises(ValueError, match="model_type: got 'None'; needs one of "):
        from_config(config, rngs=nnx.Rngs(0))
