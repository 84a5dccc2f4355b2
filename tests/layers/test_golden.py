"""Blocks against public implementations: each block turns one of their hidden states into the next."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import Attention, RMSNorm
from effattn_jax.layers import attention as attention_module
from effattn_jax.models import Block
from tests.layers.catalogue import jit
from tests.layers.golden import (
    attention_weights,
    codestral_block,
    codestral_options,
    golden,
    load,
    mistral_block,
    mistral_options,
    under,
)

# Float32 noise of the public implementations themselves: 1e-5; a window off by one: above 1.
TOLERANCE = {"atol": 5e-5, "rtol": 5e-5}
call = jit(lambda module, x: module(x))


def rms_norm(x, weight, eps):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_mamba2_block_is_codestral(layer):
    """Two groups: shared B and C, and a norm per group. Here hidden/<i> is what block i returns."""
    g = golden("mamba2_codestral")
    make = lambda: Block(32, "mamba2", codestral_options(g.config), mlp_dim=0, norm_eps=1e-5, rngs=nnx.Rngs(0))  # noqa: E731
    block = load(make, codestral_block(under(f"backbone.layers.{layer}.", g.tensors), g.config))
    x = g.hidden(layer - 1) if layer else g.tensors["backbone.embeddings.weight"][g.io["input_ids"]]
    out, _ = call(block, x)
    np.testing.assert_allclose(out, g.hidden(layer), **TOLERANCE)


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_block_is_mistral(layer):
    g = golden("mistral_swa")
    make = lambda: Block(32, "attention", mistral_options(g.config), mlp_dim=64, norm_eps=1e-6, rngs=nnx.Rngs(0))  # noqa: E731
    block = load(make, mistral_block(under(f"model.layers.{layer}.", g.tensors)))
    out, _ = call(block, g.hidden(layer))
    np.testing.assert_allclose(out, g.hidden(layer + 1), **TOLERANCE)


@pytest.mark.parametrize("layer", [1, 2])
def test_attention_with_query_key_norm_is_gemma3(layer):
    """A local layer (1) and a global one (2, rotary positions over 8). Norms scale by 1 + w; the scale of the logits,
    query_pre_attn_scalar^-0.5 where ours is head_dim^-0.5, goes into the weight of the query norm. The feed-forward
    layer and the norms after each half are Gemma's own and are written here."""
    g = golden("gemma3_text")
    t, config = under(f"model.layers.{layer}.", g.tensors), g.config
    local = config["layer_types"][layer] == "sliding_attention"
    positional = config["rope_parameters"][config["layer_types"][layer]]
    dim, head_dim = config["hidden_size"], config["head_dim"]
    make = lambda: Attention(  # noqa: E731
        dim,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=head_dim,
        window=config["sliding_window"] if local else None,
        qk_norm=True,
        rope_theta=positional["rope_theta"],
        rngs=nnx.Rngs(0),
    )
    rescale = np.sqrt(head_dim / config["query_pre_attn_scalar"])
    weights = attention_weights(under("self_attn.", t)) | {
        "q_norm.scale": (1 + t["self_attn.q_norm.weight"]) * rescale,
        "k_norm.scale": 1 + t["self_attn.k_norm.weight"],
    }
    mixer = load(make, weights)
    norm = lambda name, x: rms_norm(x, 1 + t[f"{name}.weight"], config["rms_norm_eps"])  # noqa: E731

    def block(mixer, x):
        ours = load(lambda: RMSNorm(dim), {"scale": 1 + t["input_layernorm.weight"]})
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]) / positional.get("factor", 1), x.shape[:2])
        y, _ = mixer(ours(x), positions=positions)
        x = x + norm("post_attention_layernorm", y)
        gate, up, down = (t[f"mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        h = norm("pre_feedforward_layernorm", x)
        y = (jax.nn.gelu(h @ gate, approximate=True) * (h @ up)) @ down
        return x + norm("post_feedforward_layernorm", y)

    np.testing.assert_allclose(jit(block)(mixer, g.hidden(layer)), g.hidden(layer + 1), **TOLERANCE)


def yarn(x, positions, config):
    """Rotation with frequencies that pass from theta^{-2i/K} to a slower one, times a factor (Peng et al. 2023)."""
    size, p = x.shape[-1], config["rope_parameters"]
    fast = p["rope_theta"] ** (-np.arange(0, size, 2) / size)
    turn = lambda rotations: (  # noqa: E731
        size * np.log(p["original_max_position_embeddings"] / (rotations * 2 * np.pi)) / (2 * np.log(p["rope_theta"]))
    )
    low, high = max(turn(p["beta_fast"]), 0), min(turn(p["beta_slow"]), size - 1)
    slow = np.clip((np.arange(size // 2) - low) / (high - low), 0, 1)
    frequencies = fast * (1 - slow) + fast / p["factor"] * slow
    angles = jnp.asarray(positions)[:, :, None, None] * frequencies
    factor = 0.1 * np.log(p["factor"]) + 1
    sin, cos = factor * jnp.sin(angles), factor * jnp.cos(angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def mixture(x, t, config):
    """Experts of gpt-oss, all of them on all tokens: gate and up interleaved, clipped, gate * sigmoid(1.702 gate)."""
    scores = x @ t["router.weight"].T + t["router.bias"]
    best, index = jax.lax.top_k(scores, config["num_experts_per_tok"])
    weights = jnp.sum(jax.nn.one_hot(index, scores.shape[-1]) * jax.nn.softmax(best)[..., None], axis=-2)
    both = jnp.einsum("btd,edf->btef", x, t["experts.gate_up_proj"]) + t["experts.gate_up_proj_bias"]
    limit = config["swiglu_limit"]
    gate, up = jnp.minimum(both[..., ::2], limit), jnp.clip(both[..., 1::2], -limit, limit)
    y = (up + 1) * gate * jax.nn.sigmoid(config["swiglu_alpha"] * gate)
    y = jnp.einsum("btef,efd->bted", y, t["experts.down_proj"]) + t["experts.down_proj_bias"]
    return jnp.einsum("bte,bted->btd", weights, y)


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_with_sinks_is_gpt_oss(layer, monkeypatch):
    """Windows with sinks (0) and sinks alone (1). The projections' biases go in as a channel that is always 1; the
    rotation is replaced by gpt-oss's own, and the experts are written here: the layer has neither."""
    g = golden("gpt_oss")
    t, config = under(f"model.layers.{layer}.", g.tensors), g.config
    dim, local = config["hidden_size"], config["layer_types"][layer] == "sliding_attention"
    make = lambda: Attention(  # noqa: E731
        dim + 1,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        window=config["sliding_window"] if local else None,
        sinks=True,
        rngs=nnx.Rngs(0),
    )
    weights = attention_weights(under("self_attn.", t))
    for name in ("q_proj", "k_proj", "v_proj"):
        weights[f"{name}.kernel"] = np.vstack([weights[f"{name}.kernel"], t[f"self_attn.{name}.bias"]])
    weights["out_proj.kernel"] = np.pad(weights["out_proj.kernel"], ((0, 0), (0, 1)))
    mixer = load(make, weights | {"sinks": t["self_attn.sinks"]})
    monkeypatch.setattr(attention_module, "rope", lambda x, positions, **_: yarn(x, positions, config))

    def block(mixer, x):
        h = rms_norm(x, t["input_layernorm.weight"], config["rms_norm_eps"])
        y, _ = mixer(jnp.concatenate([h, jnp.ones_like(h[..., :1])], axis=-1))
        x = x + y[..., :dim] + t["self_attn.o_proj.bias"]
        h = rms_norm(x, t["post_attention_layernorm.weight"], config["rms_norm_eps"])
        return x + mixture(h, under("mlp.", t), config)

    np.testing.assert_allclose(jit(block)(mixer, g.hidden(layer)), g.hidden(layer + 1), **TOLERANCE)
