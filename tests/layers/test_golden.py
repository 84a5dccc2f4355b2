"""Blocks against public implementations: each block turns one of their hidden states into the next."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import Attention, RMSNorm
from effattn_jax.models import Block
from tests.layers.catalogue import jit
from tests.layers.golden import (
    ATTENTION_NAMES,
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
def test_attention_with_sinks_is_gpt_oss(layer):
    """Windows with sinks (0) and sinks alone (1), biases and YaRN; the experts are written here."""
    g = golden("gpt_oss")
    t, config = under(f"model.layers.{layer}.", g.tensors), g.config
    local, p = config["layer_types"][layer] == "sliding_attention", config["rope_parameters"]
    make = lambda: Attention(  # noqa: E731
        config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        window=config["sliding_window"] if local else None,
        sinks=True,
        bias=True,
        out_bias=True,
        rope_theta=p["rope_theta"],
        rope_scaling={
            "kind": "yarn",
            "factor": p["factor"],
            "original_length": p["original_max_position_embeddings"],
            "truncate": False,
        },
        rngs=nnx.Rngs(0),
    )
    biases = {f"{ours}.bias": t[f"self_attn.{theirs}.bias"] for ours, theirs in ATTENTION_NAMES.items()}
    mixer = load(make, attention_weights(under("self_attn.", t)) | biases | {"sinks": t["self_attn.sinks"]})

    def block(mixer, x):
        h = rms_norm(x, t["input_layernorm.weight"], config["rms_norm_eps"])
        x = x + mixer(h)[0]
        h = rms_norm(x, t["post_attention_layernorm.weight"], config["rms_norm_eps"])
        return x + mixture(h, under("mlp.", t), config)

    np.testing.assert_allclose(jit(block)(mixer, g.hidden(layer)), g.hidden(layer + 1), **TOLERANCE)
