"""Mamba, Mamba-3, RG-LRU and HGRN: public models, numbers of parameters, where weights start, special cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import HGRN, RGLRU, Attention, Mamba, Mamba3
from effattn_jax.layers.lower_bound import log_forget_gate, lower_bound
from effattn_jax.models import Block, LanguageModel
from tests.layers.catalogue import DIM, agree, filled, forward, inputs, jit
from tests.layers.golden import (
    assert_fla_model,
    attention_weights,
    golden,
    load,
    prefixed,
    swiglu_weights,
    under,
)

LOGITS = {"atol": 1e-4, "rtol": 1e-4}
call = jit(lambda module, x, ids=None: module(x, segment_ids=ids)[0])


def rms_norm(x, weight, eps):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * weight


def mamba_weights(t, rank):
    """in_proj holds x, then z; x_proj the narrow channels of dt, B, C."""
    x, z = np.split(t["in_proj.weight"], 2)
    dt, B, C = np.split(t["x_proj.weight"], [rank, rank + t["A_log"].shape[1]])
    projections = {"x_proj": x, "z_proj": z, "dt_down": dt, "B_proj": B, "C_proj": C}
    projections |= {"dt_up": t["dt_proj.weight"], "out_proj": t["out_proj.weight"]}
    norms = {"dt_norm": "dt_layernorm", "B_norm": "b_layernorm", "C_norm": "c_layernorm"}
    return {
        **{f"{name}.kernel": x.T for name, x in projections.items()},
        **{f"{ours}.scale": t[f"{name}.weight"] for ours, name in norms.items() if f"{name}.weight" in t},
        "conv.taps": t["conv1d.weight"][:, 0].T,
        "conv.bias": t["conv1d.bias"],
        "dt_bias": t["dt_proj.bias"],
        "A_log": t["A_log"],
        "D": t["D"],
    }


@functools.cache
def mamba_logits(name, padded=False):
    g, norm = golden(name), "weightless" if name == "falcon_mamba" else "none"
    config, t = g.config, g.tensors
    rank, eps = config["time_step_rank"], config["layer_norm_epsilon"]
    options = {"state_dim": config["state_size"], "dt_rank": rank, "norm": norm}
    x = jnp.asarray(t["backbone.embeddings.weight"])[g.io["pad_input_ids" if padded else "input_ids"]]
    ids = np.where(g.io["pad_mask"] > 0, 0, -1) if padded else None
    for i in range(config["num_hidden_layers"]):
        own = under(f"backbone.layers.{i}.", t)
        weights = prefixed("mixer", mamba_weights(under("mixer.", own), rank)) | {"norm.scale": own["norm.weight"]}
        block = load(lambda: Block(32, "mamba", options, mlp_dim=0, norm_eps=eps, rngs=nnx.Rngs(0)), weights)
        x = call(block, x, ids)
    return rms_norm(x, t["backbone.norm_f.weight"], eps) @ t.get("lm_head.weight", t["backbone.embeddings.weight"]).T


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_mamba_is_that_of_the_public_models(name):
    np.testing.assert_allclose(mamba_logits(name), golden(name).io["logits"], **LOGITS)


def test_padding_on_the_left_is_that_of_the_public_model():
    io = golden("mamba").io
    real = io["pad_mask"] > 0
    np.testing.assert_allclose(mamba_logits("mamba", padded=True)[real], io["pad_logits"][real], **LOGITS)


def test_mamba_with_learned_norms_is_jamba():
    """Block 0: a Mamba and a SwiGLU."""
    g = golden("jamba")
    t, config = under("model.layers.0.", g.tensors), g.config
    rank, eps = config["mamba_dt_rank"], config["rms_norm_eps"]
    options = {"state_dim": config["mamba_d_state"], "dt_rank": rank, "norm": "learned", "norm_eps": eps}
    weights = {
        "norm.scale": t["input_layernorm.weight"],
        "mlp_norm.scale": t["pre_ff_layernorm.weight"],
        **prefixed("mixer", mamba_weights(under("mamba.", t), rank)),
        **prefixed("mlp", swiglu_weights(under("feed_forward.", t))),
    }
    block = load(lambda: Block(32, "mamba", options, mlp_dim=48, norm_eps=eps, rngs=nnx.Rngs(0)), weights)
    np.testing.assert_allclose(call(block, g.hidden(0)), g.hidden(1), atol=5e-5, rtol=5e-5)


def test_norms_of_jamba_with_unit_weights_are_those_of_falcon():
    options = {"state_dim": 6, "dt_rank": 3}
    plain, falcon, jamba = (
        filled(lambda norm=norm: Mamba(DIM, **options, norm=norm, rngs=nnx.Rngs(0)))
        for norm in ("none", "weightless", "learned")
    )
    for norm in (jamba.dt_norm, jamba.B_norm, jamba.C_norm):
        norm.scale[...] = jnp.ones_like(norm.scale[...])
    x = inputs(20)
    np.testing.assert_array_equal(forward(jamba, x), forward(falcon, x))
    assert np.abs(forward(plain, x) - forward(falcon, x)).max() > 1e-2


@pytest.mark.parametrize(("dim", "depth", "count"), [(768, 24, 129_135_360), (2560, 64, 2_768_345_600)])
def test_parameters_of_the_published_mambas(dim, depth, count):
    """130m and 2.8b, with 50280 tokens and a tied head."""
    size = {"vocab_size": 50280, "dim": dim, "mlp_dim": 0, "repeats": depth}
    make = lambda: LanguageModel(**size, pattern=("mamba",), mixers={}, rngs=nnx.Rngs(0))  # noqa: E731
    parameters = jax.tree.leaves(jax.eval_shape(lambda: nnx.state(make(), nnx.Param)))
    assert sum(x.size for x in parameters) == count


def test_mamba_starts_as_the_paper_says():
    rngs = lambda: nnx.Rngs(0)  # noqa: E731
    start, deep = Mamba(64, rngs=rngs()), Mamba(64, layer_count=16, rngs=rngs())
    np.testing.assert_allclose(jnp.exp(start.A_log[...]), np.tile(np.arange(1, 17), (128, 1)), rtol=1e-5)
    assert start.dt_up.kernel.shape == (4, 128)
    assert 0.45 < np.abs(start.dt_up.kernel[...]).max() <= 0.5
    dt = jax.nn.softplus(start.dt_bias[...])
    assert 0.999e-3 <= dt.min() < 2e-3 < 5e-2 < dt.max() <= 1.001e-1
    np.testing.assert_allclose(deep.out_proj.kernel[...], start.out_proj.kernel[...] / 4, rtol=1e-5)


def rg_lru_weights(t):
    """Names of transformers."""
    projections = {"linear_x": "x_proj", "linear_y": "y_proj", "linear_out": "out_proj"}
    gates = {"recurrent": "recurrence_gate", "input": "input_gate"}
    return {
        **{f"{ours}.kernel": t[f"{name}.weight"].T for name, ours in projections.items()},
        **{f"{ours}.bias": t[f"{name}.bias"] for name, ours in projections.items()},
        **{f"{ours}.kernel": t[f"rg_lru.{name}_gate_weight"] for name, ours in gates.items()},
        **{f"{ours}.bias": t[f"rg_lru.{name}_gate_bias"] for name, ours in gates.items()},
        "conv.taps": t["conv_1d.weight"][:, 0].T,
        "conv.bias": t["conv_1d.bias"],
        "rate": t["rg_lru.recurrent_param"],
    }


def from_official_names(t):
    """Tensors of a block of the Griffin release under the names of transformers."""
    rename = {"a_gate.w": "recurrent_gate_weight", "a_gate.b": "recurrent_gate_bias", "a_param": "recurrent_param"}
    rename |= {"input_gate.w": "input_gate_weight", "input_gate.b": "input_gate_bias"}
    t = {functools.reduce(lambda name, old: name.replace(old, rename[old]), rename, name): x for name, x in t.items()}
    return t | {"conv_1d.weight": t["conv_1d.w"].T[:, None], "conv_1d.bias": t["conv_1d.b"]}


def griffin_block(x, mixer, mlp, norms):
    x = x + mixer(rms_norm(x, 1 + norms[0], 1e-6))
    (gate, gate_bias), (up, up_bias), (down, down_bias) = mlp
    h = rms_norm(x, 1 + norms[1], 1e-6)
    return x + (jax.nn.gelu(h @ gate + gate_bias, approximate=True) * (h @ up + up_bias)) @ down + down_bias


@pytest.mark.parametrize("index", [0, 1, 3])
def test_rg_lru_is_that_of_recurrent_gemma(index):
    """The width differs from that of the model."""
    g = golden("recurrent_gemma")
    t, config = under(f"model.layers.{index}.", g.tensors), g.config
    make = lambda: RGLRU(32, width=config["lru_width"], heads=config["num_attention_heads"], rngs=nnx.Rngs(0))  # noqa: E731
    mixer = load(make, rg_lru_weights(under("temporal_block.", t)))
    mlp = [(t[f"mlp_block.{x}_proj.weight"].T, t[f"mlp_block.{x}_proj.bias"]) for x in ("gate", "up", "down")]
    norms = [t["temporal_pre_norm.weight"], t["channel_pre_norm.weight"]]
    y = jit(lambda mixer, x: griffin_block(x, lambda h: mixer(h)[0], mlp, norms))(mixer, g.hidden(index))
    np.testing.assert_allclose(y, g.hidden(index + 1), atol=5e-5, rtol=5e-5)


def test_whole_model_of_griffin():
    """Google's own logits. Its window of 8 looks at 8 tokens before the current one; sqrt(D) is rounded to bfloat16."""
    g = golden("recurrentgemma_official")
    t, config = g.tensors, g.config
    x = jnp.asarray(t["embedder.input_embedding"])[g.io["input_ids"]] * jnp.sqrt(32).astype(jnp.bfloat16)
    for i, kind in enumerate(config["block_types"]):
        own = under(f"blocks.{i}.", t)
        if kind == "recurrent":
            make = lambda: RGLRU(32, width=config["lru_width"], heads=config["num_heads"], rngs=nnx.Rngs(0))  # noqa: E731
            mixer, bias = load(make, rg_lru_weights(from_official_names(under("recurrent_block.", own)))), 0
        else:
            options = {"heads": 4, "kv_heads": 1, "head_dim": 8, "rope_fraction": 0.5}
            make = lambda: Attention(32, **options, window=config["attention_window_size"] + 1, rngs=nnx.Rngs(0))  # noqa: B023, E731
            attention = under("attention_block.proj_", own)
            names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "final": "o_proj"}
            mixer = load(make, attention_weights({f"{n}.weight": attention[f"{o}.weight"] for o, n in names.items()}))
            bias = attention["final.bias"]
        (gate, up), (gate_bias, up_bias) = own["mlp_block.ffw_up.w"], own["mlp_block.ffw_up.b"].reshape(2, -1)
        down = own["mlp_block.ffw_down.weight"].T, own["mlp_block.ffw_down.bias"]
        norms = [own["temporal_pre_norm.scale"], own["channel_pre_norm.scale"]]
        mlp = [(gate, gate_bias), (up, up_bias), down]
        x = griffin_block(x, lambda h, mixer=mixer, bias=bias: call(mixer, h) + bias, mlp, norms)
    logits = rms_norm(x, 1 + t["final_norm.scale"], 1e-6) @ t["embedder.input_embedding"].T
    cap = config["logits_soft_cap"]
    np.testing.assert_allclose(cap * jnp.tanh(logits / cap), g.io["logits"], **LOGITS)


def test_rg_lru_starts_with_long_memories():
    """a = rho^{8 r} with rho in (0.9, 0.999)."""
    rho = jnp.exp(-jax.nn.softplus(RGLRU(512, rngs=nnx.Rngs(0)).rate[...]))
    assert 0.8999 < rho.min() < 0.91 < 0.99 < rho.max() < 0.9991
    np.testing.assert_allclose(jnp.mean(rho**2), (0.9**2 + 0.999**2) / 2, rtol=1e-2)


def hgrn_weights(t, config, index):
    names = {"i_proj": "i_proj", "f_proj": "f_proj", "g_proj": "g_proj", "o_proj": "out_proj"}
    return {
        **{f"{ours}.kernel": t[f"{name}.weight"].T for name, ours in names.items()},
        "norm.scale": t["g_norm.weight"],
        "bound_logits": golden("fla_hgrn").tensors["model.lower_bounds"],
        "layer_index": np.float32(index),
    }


def test_hgrn_is_that_of_flash_linear_attention():
    options = lambda config, index: {"expand": config["expand_ratio"], "norm_eps": config["norm_eps"]}  # noqa: E731
    assert_fla_model("fla_hgrn", "hgrn", options, hgrn_weights)


def test_lower_bounds_rise_with_depth():
    logits = np.random.default_rng(0).standard_normal((4, 5), np.float32)
    weights = np.exp(logits) / np.exp(logits).sum(0)
    for index in range(4):
        got = lower_bound(logits, jnp.float32(index))
        np.testing.assert_allclose(got, weights[1 : index + 1].sum(0), rtol=1e-6)


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("gamma", [0.0, 1e-8, 0.3, 1 - 2**-20, 1.0])
def test_forget_gate(gamma):
    """Against float64; gradients finite, at 0 too."""
    f = np.float32([-200, -80, -20, -1, -0.01, 0, 1, 15, 80, 200])
    sigmoid = np.exp(-np.logaddexp(0, -f.astype(np.float64)))
    gamma = np.float64(np.float32(gamma))
    want = np.log1p(-(1 - gamma) * np.exp(-np.logaddexp(0, np.maximum(f, 0).astype(np.float64))))
    want = np.where(f < 0, np.log(gamma + (1 - gamma) * sigmoid), want)
    np.testing.assert_allclose(log_forget_gate(f, jnp.float32(gamma)), want, rtol=1e-6, atol=1e-7)
    gate = lambda f, gamma: jnp.sum(log_forget_gate(f, gamma))  # noqa: E731
    df, dgamma = jax.grad(gate, (0, 1))(f, jnp.float32(gamma))
    slope = (1 - gamma) * sigmoid * (1 - sigmoid) / (gamma + (1 - gamma) * sigmoid)
    np.testing.assert_allclose(df, slope, rtol=1e-5, atol=1e-6)
    assert np.isfinite(dgamma)


def test_mamba3_without_trapezoid_and_angles_is_mamba2():
    """Mamba-2's core with keys and queries that have a norm and a bias, and no convolution."""
    module = filled(lambda: Mamba3(DIM, head_dim=8, state_dim=8, rngs=nnx.Rngs(0)))
    module.angle_proj.kernel[...] *= 0
    module.mix_proj.kernel[...] *= 0
    x = inputs(20)
    x = np.concatenate([x[..., :-1], np.ones_like(x[..., :1])], axis=-1)
    module.mix_proj.kernel[...] = module.mix_proj.kernel[...].at[-1].set(40)  # lambda = sigmoid(40)
    y = forward(module, x)

    f64 = lambda variable: np.asarray(variable[...], np.float64)  # noqa: E731
    project = lambda p: x.astype(np.float64) @ f64(p.kernel)  # noqa: E731
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    normed = lambda x, norm: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * f64(norm.scale)  # noqa: E731
    k = normed(project(module.B_proj), module.B_norm)[:, :, None] + f64(module.B_bias)
    q = normed(project(module.C_proj), module.C_norm)[:, :, None] + f64(module.C_bias)
    v = project(module.x_proj).reshape(*x.shape[:2], 4, 8)
    dt = np.logaddexp(0, project(module.dt_proj) + f64(module.dt_bias))
    a = project(module.A_proj)
    a = np.exp(-np.maximum(np.where(a >= 0, 1 + a, 1 / (1 + np.abs(a))), 1e-4) * dt)
    S, out = np.zeros((2, 4, 8, 8)), np.zeros_like(v)
    for t in range(x.shape[1]):
        S = a[:, t, :, None, None] * S + np.einsum("bh,bhk,bhv->bhkv", dt[:, t], k[:, t], v[:, t])
        out[:, t] = np.einsum("bhkv,bhk->bhv", S, q[:, t]) + f64(module.D)[:, None] * v[:, t]
    want = (out.reshape(*x.shape[:2], -1) * silu(project(module.z_proj))) @ f64(module.out_proj.kernel)
    agree(want, y)


WRONG = {
    "norm: got 'layer'": lambda rngs: Mamba(16, norm="layer", rngs=rngs),
    "state_dim: got 0": lambda rngs: Mamba(16, state_dim=0, rngs=rngs),
    "dt_rank: got 0": lambda rngs: Mamba(16, dt_rank=0, rngs=rngs),
    "head_dim: got 5": lambda rngs: Mamba3(16, head_dim=5, rngs=rngs),
    "rope_fraction: got 0.1 of state_dim 8": lambda rngs: Mamba3(
        16, head_dim=8, state_dim=8, rope_fraction=0.1, rngs=rngs
    ),
    "rope_fraction: got 1.5 of state_dim 8": lambda rngs: Mamba3(
        16, head_dim=8, state_dim=8, rope_fraction=1.5, rngs=rngs
    ),
    "heads: got 3": lambda rngs: RGLRU(16, heads=3, rngs=rngs),
    "expand: got 0": lambda rngs: HGRN(16, expand=0, rngs=rngs),
    "lower_bound: got 1.0": lambda rngs: HGRN(16, lower_bound=1.0, rngs=rngs),
}


@pytest.mark.parametrize("message", WRONG)
def test_options(message):
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.")) as error:
        nnx.eval_shape(lambda: WRONG[message](nnx.Rngs(0)))
    assert "\n" not in str(error.value)
