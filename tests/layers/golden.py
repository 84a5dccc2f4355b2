"""Small random models of public implementations: weights, inputs, results. Weights go into our modules by name."""

import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effattn_jax.models import Block
from effattn_jax.models.blueprint import blueprint
from tests.layers.catalogue import jit

FOLDER = pathlib.Path(__file__).parent.parent / "fixtures" / "models"


class Golden(NamedTuple):
    config: dict
    tensors: dict  # weights under their published names
    io: dict  # input_ids, hidden/<i>, logits, gen_ids

    def hidden(self, layer):
        return self.io[f"hidden/{layer}"]


def read_safetensors(path):
    """Eight bytes with the length of a JSON header (little-endian), the header, raw tensors."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32", f"{name}: {entry['dtype']}"
        low, high = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[start + low : start + high], "<f4").reshape(entry["shape"])
    return tensors


@functools.cache
def golden(name):
    folder = FOLDER / name
    with np.load(folder / "io.npz") as io:
        return Golden(
            json.loads((folder / "config.json").read_text()), read_safetensors(folder / "model.safetensors"), dict(io)
        )


def load(make, weights):
    """What `make` builds, with every parameter from `weights`, {"q_proj.kernel": array}; no more, no less."""
    plan = blueprint(make)
    shapes = {name: leaf.shape for name, leaf in plan.shapes.items()}
    assert shapes == {name: x.shape for name, x in weights.items()}
    return plan.model({name: jnp.asarray(x) for name, x in weights.items()})


def prefixed(prefix, weights):
    return {f"{prefix}.{name}": x for name, x in weights.items()}


def mamba2_weights(t, config):
    """Weights of `effattn_jax.layers.Mamba2` from tensors "in_proj.weight", ...; rows of in_proj are z, x, B, C, dt."""
    inner, heads = config["expand"] * config["hidden_size"], config["num_heads"]
    states = 2 * config["n_groups"] * config["state_size"]
    z, x, bc, dt = np.split(t["in_proj.weight"], np.cumsum([inner, inner, states]))
    assert len(dt) == heads
    taps, bias = t["conv1d.weight"][:, 0].T, t["conv1d.bias"]
    return {
        "z_proj.kernel": z.T,
        "x_proj.kernel": x.T,
        "bc_proj.kernel": bc.T,
        "dt_proj.kernel": dt.T,
        "x_conv.taps": taps[:, :inner],
        "x_conv.bias": bias[:inner],
        "bc_conv.taps": taps[:, inner:],
        "bc_conv.bias": bias[inner:],
        "A_log": t["A_log"],
        "dt_bias": t["dt_bias"],
        "D": t["D"],
        "norm.scale": t["norm.weight"],
        "out_proj.kernel": t["out_proj.weight"].T,
    }


def attention_weights(t):
    """Weights of `effattn_jax.layers.Attention` without biases."""
    return {f"{ours}.kernel": t[f"{theirs}.weight"].T for ours, theirs in ATTENTION_NAMES.items()}


ATTENTION_NAMES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}


def swiglu_weights(t):
    return {f"{name}.kernel": t[f"{name}_proj.weight"].T for name in ("gate", "up", "down")}


def under(prefix, tensors):
    """The tensors below a name, with the rest of their names."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def codestral_block(t, config):
    """Weights of one `Block` of Mamba-2 without a feed-forward layer."""
    return {"norm.scale": t["norm.weight"]} | prefixed("mixer", mamba2_weights(under("mixer.", t), config))


def mistral_block(t):
    """Weights of one `Block` of attention and SwiGLU."""
    return {
        "norm.scale": t["input_layernorm.weight"],
        "mlp_norm.scale": t["post_attention_layernorm.weight"],
        **prefixed("mixer", attention_weights(under("self_attn.", t))),
        **prefixed("mlp", swiglu_weights(under("mlp.", t))),
    }


def codestral_options(config):
    return {
        "expand": config["expand"],
        "head_dim": config["head_dim"],
        "state_dim": config["state_size"],
        "groups": config["n_groups"],
        "conv_width": config["conv_kernel"],
        "norm_eps": config["layer_norm_epsilon"],
    }


def mistral_options(config):
    return {
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "window": config["sliding_window"],
        "rope_theta": config["rope_parameters"]["rope_theta"],
    }


def fla_logits(name, mixer, options, mixer_weights, tokens):
    """Logits of a flash-linear-attention model: pre-normed blocks of a mixer and SwiGLU between embedding and head.

    `options(config, layer)` are those of our mixer, `mixer_weights(tensors, config, layer)` its parameters from
    tensors "q_proj.weight", ...
    """
    g = golden(name)
    t, config = g.tensors, g.config
    x = jnp.asarray(t["model.embeddings.weight"])[tokens]
    for layer in range(config["num_hidden_layers"]):
        own = under(f"model.layers.{layer}.", t)
        weights = {
            "norm.scale": own["attn_norm.weight"],
            "mlp_norm.scale": own["mlp_norm.weight"],
            **prefixed("mixer", mixer_weights(under("attn.", own), config, layer)),
            **prefixed("mlp", swiglu_weights(under("mlp.", own))),
        }
        block = load(
            lambda layer=layer: Block(
                config["hidden_size"],
                mixer,
                options(config, layer),
                mlp_dim=config["intermediate_size"],
                layer_index=layer,
                layer_count=config["num_hidden_layers"],
                norm_eps=config["norm_eps"],
                rngs=nnx.Rngs(0),
            ),
            weights,
        )
        x, _ = jit(lambda block, x: block(x))(block, x)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + config["norm_eps"]) * t["model.norm.weight"]
    return x @ t["lm_head.weight"].T


def assert_fla_model(name, mixer, options, mixer_weights, long_atol=1e-4):
    """Short rows (the reference steps token by token) and long ones (the reference runs in chunks)."""
    io = golden(name).io
    for tokens, logits, atol in (("input_ids", "logits", 1e-4), ("long_ids", "long_logits", long_atol)):
        got = fla_logits(name, mixer, options, mixer_weights, io[tokens])
        np.testing.assert_allclose(got, io[logits], atol=atol, rtol=1e-4)
