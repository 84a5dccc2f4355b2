"""TTT-Linear and TTT-MLP against the models of their authors, and how they start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import TTTMLP, TTTLinear
from effattn_jax.models import Block
from tests.layers.catalogue import jit
from tests.layers.golden import golden, load, prefixed, swiglu_weights, under

NAMES = pytest.mark.parametrize(
    "name",
    [
        "ttt_linear_mamba_backbone",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("ttt_linear", "ttt_mlp", "ttt_mlp_mamba_backbone")),
    ],
)
TOLERANCE = {"atol": 5e-5, "rtol": 5e-5}


def halves(x, axis, heads):
    """The channels of each head, which stand in pairs of neighbours, as two halves."""
    x = np.moveaxis(x, axis, -1)
    pairs = x.reshape(*x.shape[:-1], heads, -1, 2)
    return np.moveaxis(np.swapaxes(pairs, -1, -2).reshape(x.shape), -1, axis)


def ttt_weights(t, config):
    """Weights of our layer from tensors "q_proj.weight", ..."""
    heads, mamba = config["num_attention_heads"], config["share_qk"]
    channels = functools.partial(halves, heads=heads)
    own = functools.partial(halves, heads=1)  # of arrays with an axis of heads
    into = lambda name: channels(t[f"{name}.weight"], 0).T  # noqa: E731
    weights = {
        "v_proj.kernel": into("v_proj"),
        "out_proj.kernel": channels(t["o_proj.weight"], 1).T,
        "norm.scale": channels(t["post_norm.weight"], 0),
        "norm.bias": channels(t["post_norm.bias"], 0),
        "lr_proj.kernel": t["learnable_ttt_lr_weight"][:, 0].T,
        "lr_proj.bias": t["learnable_ttt_lr_bias"][:, 0],
        "token_offset": t["learnable_token_idx"],
        "ln_scale": own(t["ttt_norm_weight"], 1),
        "ln_bias": own(t["ttt_norm_bias"], 1),
    }
    if mamba:
        weights |= {"qk.proj.kernel": into("q_proj"), "gate_proj.kernel": into("g_proj")}
        for name in "qk":
            weights[f"qk.{name}_conv.taps"] = channels(t[f"conv_{name}.weight"][:, 0], 0).T
            weights[f"qk.{name}_conv.bias"] = channels(t[f"conv_{name}.bias"], 0)
    else:
        weights |= {f"qk.{name}.kernel": into(name) for name in ("q_proj", "k_proj")}
    if config["ttt_layer_type"] == "linear":
        return weights | {"W": own(own(t["W1"], 1), 2), "b": own(t["b1"][:, 0], 1)}
    first = {"W1": own(t["W1"], 1), "b1": t["b1"][:, 0]}
    return weights | first | {"W2": own(t["W2"], 2), "b2": own(t["b2"][:, 0], 1)}


@functools.cache
def blocks(name):
    """With the Mamba backbone a residual convolution stands before every TTT layer."""
    g, made = golden(name), []
    config = g.config
    dim, eps = config["hidden_size"], config["rms_norm_eps"]
    options = {
        "head_dim": dim // config["num_attention_heads"],
        "mini_batch": config["mini_batch_size"],
        "base_lr": config["ttt_base_lr"],
        "backbone": "mamba" if config["share_qk"] else "transformer",
        "conv_width": config["conv_kernel"],
        "rope_theta": config["rope_theta"],
    }
    kind = f"ttt_{config['ttt_layer_type']}"
    for layer in range(config["num_hidden_layers"]):
        t = under(f"model.layers.{layer}.", g.tensors)
        if config["pre_conv"]:
            make = lambda: Block(  # noqa: E731
                dim,
                "causal_convolution",
                {"width": config["conv_kernel"]},
                mlp_dim=0,
                norm_eps=eps,
                rngs=nnx.Rngs(0),
            )
            taps, bias = t["conv.conv.weight"][:, 0].T, t["conv.conv.bias"]
            weights = {"norm.scale": t["conv.norm.weight"], "mixer.conv.taps": taps, "mixer.conv.bias": bias}
            made.append(load(make, weights))
        make = lambda: Block(dim, kind, options, mlp_dim=config["intermediate_size"], norm_eps=eps, rngs=nnx.Rngs(0))  # noqa: E731
        weights = {
            "norm.scale": t["seq_norm.weight"],
            "mlp_norm.scale": t["ffn_norm.weight"],
            **prefixed("mixer", ttt_weights(under("seq_modeling_block.", t), config)),
            **prefixed("mlp", swiglu_weights(under("mlp.", t))),
        }
        made.append(load(make, weights))
    return made


@jit
def run(blocks, embedding, scale, tokens, states):
    x, new = embedding[tokens], []
    for block, state in zip(blocks, states, strict=True):
        x, state = block(x, state)
        new.append(state)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * scale
    return x @ embedding.T, new


def model(name):
    """(tokens, states or None) -> (logits, states)."""
    t = golden(name).tensors
    fixed = (blocks(name), t["model.embed_tokens.weight"], t["model.norm.weight"])
    return lambda tokens, states=None: run(*fixed, tokens, [None] * len(fixed[0]) if states is None else states)


@NAMES
def test_logits_of_the_authors(name):
    """37 tokens leave a mini-batch of eight open."""
    io = golden(name).io
    np.testing.assert_allclose(model(name)(io["input_ids"])[0], io["logits"], **TOLERANCE)


@pytest.mark.slow
@NAMES
def test_generation_of_the_authors(name):
    """A prefill that ends inside a mini-batch, then token by token over the end of it and of the next one."""
    io, call = golden(name).io, model(name)
    logits, states = call(io["input_ids"], [block.init_state(2, 64) for block in blocks(name)])
    got = [logits[:, -1:]]
    for t in range(io["gen_ids"].shape[1] - 1):
        logits, states = call(io["gen_ids"][:, t : t + 1], states)
        got.append(logits)
    np.testing.assert_allclose(np.concatenate(got, 1), io["gen_logits"], **TOLERANCE)


@pytest.mark.parametrize("layer", [TTTLinear, TTTMLP])
@pytest.mark.quick_cases(1)
def test_start(layer):
    """Steps of base_lr / 2 K at place 1, small weights, no bias."""
    layer = layer(32, head_dim=8, rngs=nnx.Rngs(0))
    for part in layer.network():
        assert 0.015 < np.std(part.W) < 0.025
        assert not part.b.any()
    assert not layer.token_offset[...].any()
    assert not layer.lr_proj.bias[...].any()
    assert np.std(layer.lr_proj.kernel[...]) < 0.03
    assert (layer.base_lr, layer.mini_batch, layer.heads) == (1.0 if isinstance(layer, TTTLinear) else 0.1, 16, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 5}, "head_dim: got 5"),
        ({"head_dim": 1}, "head_dim: got 1"),
        ({"head_dim": 0}, "head_dim: got 0"),
        ({"head_dim": 8, "mini_batch": 0}, "mini_batch: got 0"),
        ({"head_dim": 8, "backbone": "attention"}, "backbone: got 'attention'"),
        ({"head_dim": 8, "expand": 0}, "expand: got 0"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: TTTMLP(16, **options, rngs=nnx.Rngs(0)))
