"""Whole models against public implementations: logits, greedy continuations, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.models import LanguageModel, Sampling, generate, token_losses
from effattn_jax.models.blueprint import parameters_of
from tests.layers.catalogue import jit
from tests.layers.golden import (
    FOLDER,
    codestral_block,
    codestral_options,
    golden,
    load,
    mistral_block,
    mistral_options,
    prefixed,
    under,
)

LAYERS = 3


@functools.cache
def codestral():
    g = golden("mamba2_codestral")
    make = functools.partial(build, "mamba2", codestral_options(g.config), mlp_dim=0, norm_eps=1e-5)
    blocks = [codestral_block(under(f"backbone.layers.{i}.", g.tensors), g.config) for i in range(LAYERS)]
    return g, load(make, whole(g, blocks, "backbone.embeddings", "backbone.norm_f"))


@functools.cache
def mistral():
    g = golden("mistral_swa")
    make = functools.partial(build, "attention", mistral_options(g.config), mlp_dim=64, norm_eps=1e-6)
    blocks = [mistral_block(under(f"model.layers.{i}.", g.tensors)) for i in range(LAYERS)]
    return g, load(make, whole(g, blocks, "model.embed_tokens", "model.norm"))


def build(mixer, options, **rest):
    return LanguageModel(
        vocab_size=64,
        dim=32,
        pattern=(mixer,),
        repeats=LAYERS,
        mixers={mixer: options},
        tie_embeddings=False,
        rngs=nnx.Rngs(0),
        **rest,
    )


def whole(g, blocks, embedding, norm):
    """Blocks stacked over layers, and the rest of a model."""
    return {
        "embedding": g.tensors[f"{embedding}.weight"],
        "final_norm.scale": g.tensors[f"{norm}.weight"],
        "head.kernel": g.tensors["lm_head.weight"].T,
        **prefixed("units.blocks.0", {name: np.stack([b[name] for b in blocks]) for name in blocks[0]}),
    }


MODELS = pytest.mark.parametrize("make", [codestral, mistral], ids=lambda f: f.__name__)


@MODELS
def test_logits(make):
    g, model = make()
    logits, _ = jit(lambda model, ids: model(ids))(model, g.io["input_ids"])
    np.testing.assert_allclose(logits, g.io["logits"], atol=2e-4, rtol=1e-4)


@pytest.mark.quick_cases(1)
@MODELS
def test_left_padded_logits(make):
    g, model = make()
    real = g.io["pad_mask"].astype(bool)
    segment_ids = jnp.where(real, 0, -1)
    logits, _ = jit(lambda *a: a[0](a[1], segment_ids=a[2]))(model, g.io["pad_input_ids"], segment_ids)
    assert not real.all()
    np.testing.assert_allclose(logits[real], g.io["pad_logits"][real], atol=2e-4, rtol=1e-4)


@MODELS
@pytest.mark.quick_cases(1)
def test_greedy_continuation(make):
    g, model = make()
    got = generate(model, g.io["input_ids"], max_new_tokens=12, sampling=Sampling(temperature=0))
    np.testing.assert_array_equal(got, g.io["gen_ids"])


def gradients(make):
    g, model = make()
    ids = jnp.asarray(g.io["input_ids"])

    def loss(model):
        hidden, _ = model.hidden(ids)
        return jnp.mean(token_losses(hidden[:, :-1], model.head_weights(), ids[:, 1:], chunk=24))

    value, gradient = jit(jax.value_and_grad(loss))(model)
    return g, value, parameters_of(gradient)


def check_gradients(name, value, ours):
    """`ours`: gradients under published names and shapes; recorded are norms, and products with cos(1), cos(2), ..."""
    with np.load(FOLDER / name / "grads.npz") as theirs:
        np.testing.assert_allclose(value, theirs["loss"], rtol=1e-5)
        names = {key.removeprefix("norm/") for key in theirs if key.startswith("norm/")}
        assert names == ours.keys(), names ^ ours.keys()
        for key, gradient in ours.items():
            flat = np.asarray(gradient, np.float64).ravel()
            norm = theirs[f"norm/{key}"]
            np.testing.assert_allclose(np.linalg.norm(flat), norm, rtol=1e-3, err_msg=key)
            product = flat @ np.cos(np.arange(flat.size) + 1)
            np.testing.assert_allclose(product, theirs[f"dot/{key}"], atol=1e-3 * norm, rtol=0, err_msg=key)


@pytest.mark.slow
def test_gradients_of_mistral():
    _, value, grad = gradients(mistral)
    ours = {
        "model.embed_tokens.weight": grad["embedding"],
        "model.norm.weight": grad["final_norm.scale"],
        "lm_head.weight": grad["head.kernel"].T,
    }
    kernels = {"self_attn.q": "mixer.q", "self_attn.k": "mixer.k", "self_attn.v": "mixer.v", "self_attn.o": "mixer.out"}
    kernels = {f"{theirs}_proj": f"{name}_proj" for theirs, name in kernels.items()}
    kernels |= {f"mlp.{name}_proj": f"mlp.{name}" for name in ("gate", "up", "down")}
    for i in range(LAYERS):
        layer, block = f"model.layers.{i}", "units.blocks.0"
        ours[f"{layer}.input_layernorm.weight"] = grad[f"{block}.norm.scale"][i]
        ours[f"{layer}.post_attention_layernorm.weight"] = grad[f"{block}.mlp_norm.scale"][i]
        for theirs, name in kernels.items():
            ours[f"{layer}.{theirs}.weight"] = grad[f"{block}.{name}.kernel"][i].T
    check_gradients("mistral_swa", value, ours)


@pytest.mark.slow
def test_gradients_of_codestral():
    _, value, grad = gradients(codestral)
    ours = {
        "backbone.embeddings.weight": grad["embedding"],
        "backbone.norm_f.weight": grad["final_norm.scale"],
        "lm_head.weight": grad["head.kernel"].T,
    }
    for i in range(LAYERS):
        mixer = {name: x[i] for name, x in under("units.blocks.0.mixer.", grad).items()}
        layer = f"backbone.layers.{i}"
        ours[f"{layer}.norm.weight"] = grad["units.blocks.0.norm.scale"][i]
        ours[f"{layer}.mixer.norm.weight"] = mixer["norm.scale"]
        ours[f"{layer}.mixer.out_proj.weight"] = mixer["out_proj.kernel"].T
        projections = [mixer[f"{name}_proj.kernel"] for name in ("z", "x", "bc", "dt")]
        ours[f"{layer}.mixer.in_proj.weight"] = np.concatenate(projections, axis=1).T
        ours[f"{layer}.mixer.conv1d.weight"] = np.concatenate([mixer["x_conv.taps"], mixer["bc_conv.taps"]], axis=1).T
        ours[f"{layer}.mixer.conv1d.bias"] = np.concatenate([mixer["x_conv.bias"], mixer["bc_conv.bias"]])
        for name in ("A_log", "dt_bias", "D"):
            ours[f"{layer}.mixer.{name}"] = mixer[name]
    check_gradients("mamba2_codestral", value, ours)
