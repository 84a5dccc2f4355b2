"""GLA, HGRN2, RWKV-5 and RWKV-6: whole public models, where weights start, and the layers they contain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers import (
    HGRN,
    HGRN2,
    RWKV5,
    RWKV6,
    GatedLinearAttention,
    LayerNorm,
    MultiScaleRetention,
    RWKV5ChannelMix,
    RWKV6ChannelMix,
)
from effattn_jax.layers.retention import retention_decay
from effattn_jax.linear import vector_decay
from effattn_jax.models import Block
from effattn_jax.models.blueprint import parameters_of
from tests.layers.catalogue import DIM, agree, filled, forward, inputs, jit, layer, random, step
from tests.layers.golden import assert_fla_model, golden, load, under

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
QKV = ("q", "k", "v")


def gla_options(config, layer):
    return {
        "heads": config["num_heads"],
        "kv_heads": config["num_kv_heads"],
        "expand_k": config["expand_k"],
        "expand_v": config["expand_v"],
        "conv_width": config["conv_size"] if config["use_short_conv"] else None,
        "gate_floor": config["clamp_min"],
        "norm_eps": config["norm_eps"],
    }


def gla_weights(t, config, layer):
    ours = {"o_proj": "out_proj", "g_proj": "gate_proj", "gk_proj.0": "decay_proj.down", "gk_proj.1": "decay_proj.up"}
    ours |= {f"{name}_proj": f"{name}_proj" for name in QKV}
    taps = {f"{name}_conv.taps": t[f"{name}_conv1d.weight"][:, 0].T for name in QKV if config["use_short_conv"]}
    return {
        **{f"{name}.kernel": t[f"{theirs}.weight"].T for theirs, name in ours.items()},
        **taps,
        "decay_proj.up.bias": t["gk_proj.1.bias"],
        "norm.scale": t["g_norm_swish_gate.weight"],
    }


@pytest.mark.parametrize("name", ["fla_gla", "fla_gla_gqa_conv"])
@pytest.mark.slow
def test_gla_is_that_of_flash_linear_attention(name):
    assert_fla_model(name, "gla", gla_options, gla_weights)


@pytest.mark.slow
def test_hgrn2_is_that_of_flash_linear_attention():
    """Logits of the lower bounds are the model's; each of our layers has them all. The eps of the config, 1e-6, is
    not that of the norm in its mixers, 1e-5."""

    def weights(t, config, layer):
        ours = {"q_proj": "q_proj", "f_proj": "f_proj", "i_proj": "i_proj", "o_proj": "out_proj"}
        return {
            **{f"{name}.kernel": t[f"{theirs}.weight"].T for theirs, name in ours.items()},
            "norm.scale": t["g_norm.weight"],
            "bound_logits": golden("fla_hgrn2").tensors["model.lower_bounds"],
            "layer_index": np.float32(layer),
        }

    assert_fla_model("fla_hgrn2", "hgrn2", lambda config, layer: {"head_dim": config["expand_ratio"]}, weights)


class Model(nnx.Module):
    """Norms with a bias, one over the embedding; x + time mix, x + channel mix."""

    def __init__(self, embedding, embedding_norm, layers, last_norm, head):
        self.embedding, self.head = nnx.Param(jnp.asarray(embedding)), nnx.Param(jnp.asarray(head))
        self.embedding_norm, self.last_norm = norm(embedding_norm), norm(last_norm)
        self.layers = nnx.List(nnx.List(layer) for layer in layers)

    def __call__(self, tokens, states=None):
        x, new = self.embedding_norm(self.embedding[...][tokens]), []
        for i, (time_norm, time, channel_norm, channel) in enumerate(self.layers):
            time_state, channel_state = (None, None) if states is None else states[i]
            y, time_state = time(time_norm(x), time_state)
            x = x + y
            y, channel_state = channel(channel_norm(x), channel_state)
            x = x + y
            new.append((time_state, channel_state))
        return self.last_norm(x) @ self.head[...].T, new

    def init_states(self, batch):
        return [(time.init_state(batch, 1), channel.init_state(batch, 1)) for _, time, _, channel in self.layers]


run = jit(lambda model, tokens, states=None: model(tokens, states))


def norm(t):
    return load(lambda: LayerNorm(t["weight"].size), {"scale": t["weight"], "bias": t["bias"]})


PROJECTIONS = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "gate": "g_proj", "output": "out_proj"}


def kernels(t):
    """Projections under the authors' names."""
    return {f"{ours}.kernel": t[f"{name}.weight"].T for name, ours in PROJECTIONS.items() if f"{name}.weight" in t}


def vectors(t, names):
    return {ours: t[name].reshape(-1) for ours, name in names.items()}


def time_mix_5(t, size):
    names = {f"mu_{c}": f"time_mix_{c}" for c in "rkvg"} | {"w": "time_decay", "u": "time_faaaa"}
    names |= {"norm.scale": "ln_x.weight", "norm.bias": "ln_x.bias"}
    weights = kernels(t) | vectors(t, names)
    return load(lambda: RWKV5(t["ln_x.weight"].size, head_dim=size, rngs=nnx.Rngs(0)), weights)


def time_mix_6(t, size, **options):
    names = {f"mu_{c}": f"time_maa_{c}" for c in "xwkvrg"} | {"w": "time_decay", "u": "time_faaaa"}
    names |= {"norm.scale": "ln_x.weight", "norm.bias": "ln_x.bias"}
    matrices = {"mix_down.kernel": "maa_w1", "mix_up": "maa_w2", "w_down.kernel": "decay_w1", "w_up.kernel": "decay_w2"}
    weights = kernels(t) | vectors(t, names) | {ours: t[f"time_{name}"] for ours, name in matrices.items()}
    ranks = {"mix_rank": t["time_maa_w2"].shape[1], "decay_rank": t["time_decay_w2"].shape[0]}
    make = lambda: RWKV6(t["ln_x.weight"].size, head_dim=size, **ranks, **options, rngs=nnx.Rngs(0))  # noqa: E731
    return load(make, weights)


def channel_mix(t, layer, mu):
    hidden, dim = t["key.weight"].shape
    weights = kernels(t) | vectors(t, {f"mu_{c}": f"{mu}_{c}" for c in "kr"})
    return load(lambda: layer(dim, hidden, rngs=nnx.Rngs(0)), weights)


@functools.cache
def authors(name):
    t, config = golden(name).tensors, golden(name).config
    time, layer, mu = {
        "rwkv5": (time_mix_5, RWKV5ChannelMix, "time_mix"),
        "rwkv6": (time_mix_6, RWKV6ChannelMix, "time_maa"),
    }[name]
    layers = []
    for i in range(config["n_layer"]):
        own = functools.partial(under, tensors={k.removeprefix(f"blocks.{i}."): x for k, x in t.items()})
        time_mix = time(own("att."), config["head_size"])
        layers.append((norm(own("ln1.")), time_mix, norm(own("ln2.")), channel_mix(own("ffn."), layer, mu)))
    return Model(t["emb.weight"], under("blocks.0.ln0.", t), layers, under("ln_out.", t), t["head.weight"])


@pytest.mark.parametrize("name", ["rwkv5", "rwkv6"])
def test_model_of_the_authors(name):
    io = golden(name).io
    logits, _ = run(authors(name), io["input_ids"])
    np.testing.assert_allclose(logits, io["logits"], **TOLERANCE)


@pytest.mark.parametrize("name", ["rwkv5", "rwkv6"])
def test_states_and_generation_of_the_authors(name):
    io, model = golden(name).io, authors(name)
    logits, states = run(model, io["input_ids"], model.init_states(2))
    for i, (time, channel) in enumerate(states):
        np.testing.assert_allclose(time.shift[:, 0], io[f"final_state/{3 * i}"], **TOLERANCE)
        np.testing.assert_allclose(time.memory, io[f"final_state/{3 * i + 1}"], **TOLERANCE)
        np.testing.assert_allclose(channel.shift[:, 0], io[f"final_state/{3 * i + 2}"], **TOLERANCE)
    logits = logits[:, -1]
    for i in range(io["gen_ids"].shape[1]):
        np.testing.assert_allclose(logits, io["gen_logits"][:, i], **TOLERANCE)
        np.testing.assert_array_equal(np.argmax(logits, axis=-1), io["gen_ids"][:, i])
        logits, states = run(model, io["gen_ids"][:, i : i + 1], states)
        logits = logits[:, 0]


@functools.cache
def flash_linear_attention():
    """Their shares come in the order r, w, k, v, g, the second factors of all in one matrix."""
    t, config = golden("fla_rwkv6").tensors, golden("fla_rwkv6").config
    dim, order = config["hidden_size"], [1, 2, 3, 0, 4]
    layers = []
    for i in range(config["num_hidden_layers"]):
        own = functools.partial(under, tensors={k.removeprefix(f"model.layers.{i}."): x for k, x in t.items()})
        att, ffn = own("attn."), own("ffn.")
        down = att["x_proj.0.linear.weight"].T.reshape(dim, 5, -1)[:, order]
        up = att["x_proj.2.weight"].reshape(dim, 5, -1)[:, order].transpose(1, 2, 0)
        names = {"receptance": "r_proj.linear", "key": "k_proj.linear", "value": "v_proj.linear"}
        names |= {"gate": "g_proj.linear", "output": "o_proj"}
        time = {
            **{f"{theirs}.weight": att[f"{name}.weight"] for theirs, name in names.items()},
            **{f"time_maa_{c}": att["x_bias"][j] for j, c in enumerate("rwkvg")},
            "time_maa_x": att["x_proj.0.mu"],
            "time_maa_w1": down.reshape(dim, -1),
            "time_maa_w2": up,
            "time_decay": att["w_proj.linear.lora.2.bias"],
            "time_decay_w1": att["w_proj.linear.lora.0.weight"].T,
            "time_decay_w2": att["w_proj.linear.lora.2.weight"].T,
            "time_faaaa": att["bonus"],
            "ln_x.weight": att["g_norm.weight"],
            "ln_x.bias": att["g_norm.bias"],
        }
        channel = {
            "key.weight": ffn["key.linear.weight"],
            "value.weight": ffn["value.weight"],
            "receptance.weight": ffn["receptance.linear.weight"],
            "mu_k": ffn["key.mu"],
            "mu_r": ffn["receptance.mu"],
        }
        time_mix = time_mix_6(time, dim // config["num_heads"], norm_eps=config["norm_eps"])
        channels = channel_mix(channel, RWKV6ChannelMix, "mu")
        layers.append((norm(own("attn_norm.")), time_mix, norm(own("ffn_norm.")), channels))
    embedding_norm = under("model.layers.0.pre_norm.", t)
    return Model(t["model.embeddings.weight"], embedding_norm, layers, under("model.norm.", t), t["lm_head.weight"])


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("tokens", "logits"), [("input_ids", "logits"), ("long_ids", "long_logits")])
def test_rwkv6_is_that_of_flash_linear_attention(tokens, logits):
    io = golden("fla_rwkv6").io
    got, _ = run(flash_linear_attention(), io[tokens])
    np.testing.assert_allclose(got, io[logits], **TOLERANCE)


def test_gla_with_constant_gates_is_retention():
    """Without rotation; the same gate for all channels of a head."""
    retention = filled(lambda: MultiScaleRetention(DIM, heads=2, value_dim=8, rotation="none", rngs=nnx.Rngs(0)))
    make = lambda: GatedLinearAttention(  # noqa: E731
        DIM, heads=2, expand_k=1.0, gate_rank=1, gate_temperature=1.0, norm_eps=1e-6, rngs=nnx.Rngs(0)
    )
    log_gamma = np.asarray(retention_decay(2), np.float64)
    weights = dict(parameters_of(retention)) | {
        "decay_proj.down.kernel": np.zeros((DIM, 1)),
        "decay_proj.up.kernel": np.zeros((1, DIM)),
        "decay_proj.up.bias": np.repeat(log_gamma - np.log(-np.expm1(log_gamma)), DIM // 2),
        "norm.scale": np.ones(8),
    }
    agree(forward(retention, inputs(70)), forward(load(make, weights), inputs(70)))


def test_hgrn2_without_lower_bound_is_gla_with_tied_keys():
    x, module = inputs(70), layer("hgrn2_first")

    def gla(module, x):
        by_heads = lambda y: y.reshape(*x.shape[:2], -1, module.head_dim)  # noqa: E731
        f = by_heads(module.f_proj(x))
        q, v = by_heads(jax.nn.silu(module.q_proj(x))), by_heads(module.i_proj(x))
        o, _ = vector_decay(q, jax.nn.sigmoid(-f), v, jax.nn.log_sigmoid(f))
        return module.out_proj(module.norm(o.reshape(x.shape)))

    agree(jit(gla)(module, x), forward(module, x))


def test_hgrn2_near_the_largest_bound_forgets_and_writes_nothing():
    module = filled(lambda: HGRN2(DIM, head_dim=8, lower_bound=1 - 1e-7, rngs=nnx.Rngs(0)))
    state = module.init_state(2, 70)._replace(memory=jnp.asarray(random("memory", 2, 2, 8, 8)))
    _, after = step(module, inputs(70), state)
    agree(state.memory, after.memory, limit=1e-4)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_lower_bound_of_hgrn2(index):
    """Sums of a softmax over the layers, without its first entry; the index may be traced."""
    logits = random("logits", 4, DIM)

    def gamma(index, logits):
        module = HGRN2(DIM, head_dim=8, layer_index=index, layer_count=4, rngs=nnx.Rngs(0))
        module.bound_logits[...] = logits
        return module.gamma()

    share = np.exp(logits) / np.exp(logits).sum(0)
    np.testing.assert_allclose(jit(gamma)(index, logits), share[1 : index + 1].sum(0), atol=1e-6)


@pytest.mark.parametrize("make", [HGRN, HGRN2])
def test_a_layer_that_leaves_the_lower_bounds_to_the_stack(make):
    options = {"head_dim": 8} if make is HGRN2 else {}
    module = nnx.eval_shape(lambda: make(DIM, **options, layer_count=4, own_bounds=False, rngs=nnx.Rngs(0)))
    assert not hasattr(module, "bound_logits")
    with pytest.raises(ValueError, match=r"^bounds: got None; needs those of the stack"):
        jax.eval_shape(lambda module: module(inputs(3))[0], module)
    y, _ = jax.eval_shape(lambda module, bounds: module.with_bounds(inputs(3), None, bounds), module, inputs(4)[0])
    assert y.shape == inputs(3).shape


def test_rwkv6_without_low_rank_parts_is_rwkv5():
    rwkv5 = layer("rwkv5")
    ours = dict(parameters_of(rwkv5))
    mus = {f"mu_{c}": 1 - ours[f"mu_{c}"] for c in "rkvg"}
    idle = {
        "mu_x": random("mu_x", DIM),
        "mu_w": random("mu_w", DIM),
        "mix_down.kernel": random("down", DIM, 15),
        "mix_up": np.zeros((5, 3, DIM)),
        "w_down.kernel": random("decay", DIM, 5),
        "w_up.kernel": np.zeros((5, DIM)),
    }
    rwkv6 = load(
        lambda: RWKV6(DIM, head_dim=4, mix_rank=3, decay_rank=5, norm_eps=0.1, rngs=nnx.Rngs(0)), ours | mus | idle
    )
    agree(forward(rwkv5, inputs(70)), forward(rwkv6, inputs(70)))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("version", [5, 6])
def test_rwkv_block_in_two_calls_is_one_pass(version):
    """Time mix and channel mix in a `Block`, each with a state of its own."""
    mixer, mlp = f"rwkv{version}", f"rwkv{version}_channel_mix"
    block = filled(
        lambda: Block(DIM, mixer, {"head_dim": 4}, mlp=mlp, mlp_dim=24, layer_index=1, layer_count=2, rngs=nnx.Rngs(0))
    )
    first, state = step(block, inputs(9)[:, :4], block.init_state(2, 9))
    second, _ = step(block, inputs(9)[:, 4:], state)
    agree(forward(block, inputs(9)), jnp.concatenate([first, second], axis=1))


@pytest.mark.parametrize("w", [6.0, 100.0])
@pytest.mark.slow
def test_rwkv_with_a_decay_beyond_float32(w):
    """Such a memory holds nothing; gradients are numbers."""

    def loss(module, x):
        return jnp.sum(module(x)[0])

    module = filled(lambda: RWKV5(DIM, head_dim=4, rngs=nnx.Rngs(0)))
    module.w[...] = jnp.full((DIM,), w)
    for x in jax.tree.leaves(jit(jax.grad(loss))(module, inputs(9))):
        assert np.isfinite(x).all()
    _, state = step(module, inputs(9), module.init_state(2, 9))
    _, last = step(module, inputs(9)[:, -2:], module.init_state(2, 9))
    agree(last.memory, state.memory)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("index", [0, 1, 4])
def test_where_rwkv_starts(index):
    """Channel by channel from the authors' formulas; the index may be traced."""
    dim, count = 12, 5

    @jit
    def starts(index):
        own = {"layer_index": index, "layer_count": count, "rngs": nnx.Rngs(0)}
        layers = {
            "5": RWKV5(dim, head_dim=4, **own),
            "6": RWKV6(dim, head_dim=4, **own),
            "mix5": RWKV5ChannelMix(dim, 42, **own),
            "mix6": RWKV6ChannelMix(dim, 42, **own),
        }
        return {name: parameters_of(layer) for name, layer in layers.items()}

    got = starts(index)
    height, rest = index / (count - 1), 1 - index / count
    line, n = np.arange(dim) / (dim - 1), np.arange(dim)
    share = {"k": (n / dim) ** rest, "r": (n / dim) ** (0.5 * rest), "g": (n / dim) ** (0.5 * rest)}
    share |= {"v": share["k"] + 0.3 * height, "w": share["k"], "x": share["k"]}
    close = functools.partial(np.testing.assert_allclose, atol=2e-6)
    for name in ("5", "6"):
        close(got[name]["w"], -6 + 5 * line ** (0.7 + 1.3 * height))
        close(got[name]["u"], height * (1 - line) + np.array([0, 0.1, -0.1] * 4))
        close(got[name]["norm.scale"], np.full(dim, ((1 + index) / count) ** 0.7))
        assert not np.any(got[name]["out_proj.kernel"])
        for projection, gain in (("r", 1), ("k", 0.1), ("v", 1), ("g", 0.1)):
            kernel = np.asarray(got[name][f"{projection}_proj.kernel"])
            close(kernel.T @ kernel, gain**2 * np.eye(dim))
    for c in "kvrg":
        close(got["5"][f"mu_{c}"], share[c])
    for c in "xwkvrg":
        close(got["6"][f"mu_{c}"], 1 - share[c])
    for name in ("mix_down.kernel", "w_down.kernel"):
        assert not np.any(got["6"][name])
    for name, size in (("mix_up", 32), ("w_up.kernel", 64)):
        assert got["6"][name].shape[-2] == size
        assert 0.009 < np.abs(got["6"][name]).max() <= 0.01
    for c in "kr":
        close(got["mix5"][f"mu_{c}"], share["k"])
        close(got["mix6"][f"mu_{c}"], 1 - share["k"])
    for name in ("mix5", "mix6"):
        assert not np.any(got[name]["v_proj.kernel"])
        assert not np.any(got[name]["r_proj.kernel"])


def test_gla_starts_with_a_long_memory():
    """Gates near (1/2)^(1/16) where nothing is learned yet."""
    module = GatedLinearAttention(DIM, rngs=nnx.Rngs(0))
    assert (module.heads, module.key_dim, module.value_dim, module.decay_proj.down.kernel.shape[1]) == (4, 2, 4, 16)
    x = np.zeros((1, 1, DIM), np.float32)
    _, state = step(module, x, module.init_state(1, 1)._replace(memory=jnp.ones((1, 4, 2, 4))))
    agree(np.full((1, 4, 2, 4), 0.5 ** (1 / 16)), state.memory)


WRONG = {
    "heads: got 0": lambda **o: GatedLinearAttention(DIM, heads=0, **o),
    "kv_heads: got 3": lambda **o: GatedLinearAttention(DIM, kv_heads=3, **o),
    "expand_k: got 0.3": lambda **o: GatedLinearAttention(DIM, expand_k=0.3, **o),
    "expand_v: got -1": lambda **o: GatedLinearAttention(DIM, expand_v=-1, **o),
    "gate_temperature: got 0": lambda **o: GatedLinearAttention(DIM, gate_temperature=0, **o),
    "gate_floor: got 0.5": lambda **o: GatedLinearAttention(DIM, gate_floor=0.5, **o),
    "head_dim: got 5": lambda **o: HGRN2(DIM, head_dim=5, **o),
    "lower_bound: got 1": lambda **o: HGRN2(DIM, head_dim=8, lower_bound=1, **o),
    "head_dim: got 3": lambda **o: RWKV5(DIM, head_dim=3, **o),
    "head_dim: got 0": lambda **o: RWKV6(DIM, head_dim=0, **o),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_options(message):
    with pytest.raises(checks.ArgumentError, match=rf"^{message}.*; needs .+") as error:
        nnx.eval_shape(lambda: WRONG[message](rngs=nnx.Rngs(0)))
    assert "\n" not in str(error.value)
