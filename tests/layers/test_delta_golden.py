"""Layers of the delta rules against public models."""

import numpy as np
import pytest
from flax import nnx

from effattn_jax.models import Block
from tests.layers.catalogue import jit
from tests.layers.golden import assert_fla_model, golden, load, prefixed, swiglu_weights, under


def options(config, layer):
    return {
        "heads": config["num_heads"],
        "head_dim": config.get("head_dim", config["hidden_size"] // config["num_heads"]),
        "expand_v": config["expand_v"],
        "conv_width": config["conv_size"],
        "norm_eps": config["norm_eps"],
    }


def negative(config):
    return {"allow_negative_eigenvalues": config["allow_neg_eigval"]}


OPTIONS = {
    "delta_net": lambda c, layer: (
        options(c, layer)
        | negative(c)
        | {"qk_activation": c["qk_activation"], "qk_norm": c["qk_norm"], "output_gate": c["use_gate"]}
    ),
    "gated_delta_net": lambda c, layer: (
        options(c, layer) | negative(c) | {"value_heads": c["num_v_heads"], "output_gate": c["use_gate"]}
    ),
    "gated_delta_product": lambda c, layer: (
        options(c, layer)
        | negative(c)
        | {
            "householders": c["num_householder"],
            "forget_gate": c["use_forget_gate"],
            "output_gate": c["use_output_gate"],
        }
    ),
    "kda": lambda c, layer: (
        options(c, layer)
        | negative(c)
        | {"value_heads": c["num_v_heads"], "lower_bound": c["lower_bound"], "gate_bias": True}
    ),
    "comba": lambda c, layer: (
        options(c, layer)
        | {
            "value_heads": c["num_v_heads"],
            "inner_decay": c["use_inner_decay"],
            "output_correction": c["correction_factor"] if c["use_output_correction"] else None,
            "output_gate": c["use_output_gate"],
            "normalize_feedback": True,
        }
    ),
}

NAMES = {
    "A_log": "decay.A_log",
    "dt_bias": "decay.dt_bias",
    "decay": "d",
    "D": "D",
    "o_norm.weight": "norm.scale",
    "o_proj.weight": "out_proj.kernel",
    "f_proj.0.weight": "f_proj.down.kernel",
    "f_proj.1.weight": "f_proj.up.kernel",
    "g_proj.0.weight": "g_proj.down.kernel",
    "g_proj.1.weight": "g_proj.up.kernel",
    "g_proj.1.bias": "g_proj.up.bias",
    "f_a_proj.weight": "f_proj.down.kernel",
    "f_b_proj.weight": "f_proj.up.kernel",
    "g_a_proj.weight": "g_proj.down.kernel",
    "g_b_proj.weight": "g_proj.up.kernel",
    **{f"{x}_proj.weight": f"{x}_proj.kernel" for x in "abg"},
    **{f"{x}_proj.weight": f"qkv.{x}_proj.kernel" for x in "qkv"},
    **{f"{x}_conv1d.weight": f"qkv.{x}_conv.taps" for x in "qkv"},
}


def weights(tensors, config=None, layer=None):
    """Under our names: matrices and filters transposed, numbers per head flat."""
    flat = lambda name, x: x.reshape(-1) if name in ("A_log", "dt_bias") else x  # noqa: E731
    turned = lambda x: x[:, 0].T if x.ndim == 3 else x.T  # noqa: E731
    return {NAMES[name]: turned(flat(name, x)) for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("model", "mixer"),
    [
        ("fla_delta_net", "delta_net"),
        ("fla_delta_net_gate_neg", "delta_net"),
        ("fla_gated_deltanet", "gated_delta_net"),
        ("fla_gated_deltanet_gva", "gated_delta_net"),
        ("fla_gated_deltaproduct", "gated_delta_product"),
        ("fla_kda", "kda"),
        ("fla_comba", "comba"),
    ],
)
@pytest.mark.slow
def test_flash_linear_attention(model, mixer):
    assert_fla_model(model, mixer, OPTIONS[mixer], weights)


def qwen3_weights(t, config):
    """Each key head has rows for q, k, its values, their gates; and for its betas, their decays. One convolution."""
    heads, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    value_size = config["linear_value_head_dim"]
    each = config["linear_num_value_heads"] // heads

    def cut(x, *sizes):
        parts = np.split(x.reshape(heads, -1, x.shape[1]), np.cumsum(sizes)[:-1], axis=1)
        return [part.reshape(-1, x.shape[1]).T for part in parts]

    q, k, v, z = cut(t["in_proj_qkvz.weight"], size, size, each * value_size, each * value_size)
    b, a = cut(t["in_proj_ba.weight"], each, each)
    taps = np.split(t["conv1d.weight"][:, 0].T, [heads * size, 2 * heads * size], axis=1)
    return {
        **{f"qkv.{name}_proj.kernel": x for name, x in zip("qkv", (q, k, v), strict=True)},
        **{f"qkv.{name}_conv.taps": x for name, x in zip("qkv", taps, strict=True)},
        **{f"{name}_proj.kernel": x for name, x in zip("gba", (z, b, a), strict=True)},
        **{f"decay.{name}": t[name] for name in ("A_log", "dt_bias")},
        "norm.scale": t["norm.weight"],
        "out_proj.kernel": t["out_proj.weight"].T,
    }


def test_gated_delta_net_is_qwen3_next():
    """Block 1, the one without experts; norms scale by 1 + w, but for that of the mixer."""
    g = golden("qwen3_next")
    t, config = under("model.layers.1.", g.tensors), g.config
    options = {
        "heads": config["linear_num_key_heads"],
        "value_heads": config["linear_num_value_heads"],
        "head_dim": config["linear_key_head_dim"],
        "expand_v": config["linear_value_head_dim"] / config["linear_key_head_dim"],
        "conv_width": config["linear_conv_kernel_dim"],
        "norm_eps": config["rms_norm_eps"],
    }
    own = {
        "norm.scale": 1 + t["input_layernorm.weight"],
        "mlp_norm.scale": 1 + t["post_attention_layernorm.weight"],
        **prefixed("mixer", qwen3_weights(under("linear_attn.", t), config)),
        **prefixed("mlp", swiglu_weights(under("mlp.", t))),
    }
    assert_block(g, 1, "gated_delta_net", options, own, config["intermediate_size"])


def test_kda_is_kimi_linear():
    """Block 0, the one without experts."""
    g = golden("kimi_linear")
    t, config = under("model.layers.0.", g.tensors), g.config
    options = {
        "heads": config["linear_num_heads"],
        "head_dim": config["linear_head_dim"],
        "conv_width": config["linear_conv_kernel_dim"],
        "norm_eps": config["rms_norm_eps"],
    }
    own = {
        "norm.scale": t["input_layernorm.weight"],
        "mlp_norm.scale": t["post_attention_layernorm.weight"],
        **prefixed("mixer", weights(under("self_attn.", t))),
        **prefixed("mlp", swiglu_weights(under("mlp.", t))),
    }
    assert_block(g, 0, "kda", options, own, config["intermediate_size"])


def assert_block(g, layer, mixer, options, own, mlp_dim):
    """It turns one hidden state of the model into the next."""
    dim, eps = g.config["hidden_size"], g.config["rms_norm_eps"]
    make = lambda: Block(dim, mixer, options, mlp_dim=mlp_dim, norm_eps=eps, rngs=nnx.Rngs(0))  # noqa: E731
    out, _ = jit(lambda block, x: block(x))(load(make, own), g.hidden(layer))
    np.testing.assert_allclose(out, g.hidden(layer + 1), atol=5e-5, rtol=5e-5)
