"""RWKV-7: whole public models from its two layers, published numbers of each, and where weights start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import RWKV7, LayerNorm, RWKV7ChannelMix
from effattn_jax.layers.first_value import FirstValue
from effattn_jax.models.blueprint import parameters_of
from tests.layers.catalogue import jit
from tests.layers.golden import golden, load, under
from tests.linear.det import det

TIME_MIX = {
    "receptance.weight": "r_proj.kernel",
    "key.weight": "k_proj.kernel",
    "value.weight": "v_proj.kernel",
    "output.weight": "out_proj.kernel",
    "ln_x.weight": "norm.scale",
    "ln_x.bias": "norm.bias",
    **{f"x_{c}": f"mu_{c}" for c in "rwkvag"},
    **{name: name for name in ("k_k", "k_a", "r_k")},
    **{f"{c}0": f"{ours}.up.bias" for c, ours in (("w", "w_proj"), ("a", "a_proj"), ("v", "v_mix"))},
    **{f"{c}1": f"{ours}.down.kernel" for c, ours in zip("wavg", ("w_proj", "a_proj", "v_mix", "g_proj"), strict=True)},
    **{f"{c}2": f"{ours}.up.kernel" for c, ours in zip("wavg", ("w_proj", "a_proj", "v_mix", "g_proj"), strict=True)},
}
FLA_TIME_MIX = {
    "r_proj.weight": "receptance.weight",
    "k_proj.weight": "key.weight",
    "v_proj.weight": "value.weight",
    "o_proj.weight": "output.weight",
    "g_norm.weight": "ln_x.weight",
    "g_norm.bias": "ln_x.bias",
    **{f"{c}_lora.lora.{i}.weight": f"{c}{j}" for c in "wavg" for i, j in ((0, 1), (2, 2))},
    **{f"{c}_lora.lora.2.bias": f"{c}0" for c in "wav"},
}


def time_mix(t, head_dim, **options):
    """The layer from tensors under the authors' names: y = W x, x W W'. The first layer has no v0, v1, v2."""
    dim, ranks = t["k_k"].size, {c: t.get(f"{c}1", np.zeros((1, 2))).shape[1] for c in "wavg"}
    rest = {"v_mix.up.bias": np.zeros(dim), "v_mix.down.kernel": np.zeros((dim, ranks["v"]))}
    rest["v_mix.up.kernel"] = rest["v_mix.down.kernel"].T
    flat = lambda name, x: x.reshape(-1) if name.startswith(("x_", "k_")) or name[1:] == "0" else x  # noqa: E731
    ours = {TIME_MIX[name]: x.T if name.endswith("weight") else flat(name, x) for name, x in t.items()}
    make = lambda: RWKV7(  # noqa: E731
        dim,
        head_dim=head_dim,
        decay_rank=ranks["w"],
        rate_rank=ranks["a"],
        value_rank=ranks["v"],
        gate_rank=ranks["g"],
        **options,
        rngs=nnx.Rngs(0),
    )
    return load(make, rest | ours)


def channel_mix(t):
    hidden, dim = t["key.weight"].shape
    weights = {"mu_k": t["x_k"].reshape(-1), "k_proj.kernel": t["key.weight"].T, "v_proj.kernel": t["value.weight"].T}
    return load(lambda: RWKV7ChannelMix(dim, hidden, rngs=nnx.Rngs(0)), weights)


def norm(t):
    return load(lambda: LayerNorm(t["weight"].size), {"scale": t["weight"], "bias": t["bias"]})


class Model(nnx.Module):
    """Norms with a bias, one over the embedding; x + time mix, x + channel mix; the first values go up."""

    def __init__(self, embedding, embedding_norm, layers, last_norm, head):
        self.embedding, self.head = nnx.Param(jnp.asarray(embedding)), nnx.Param(jnp.asarray(head))
        self.embedding_norm, self.last_norm = embedding_norm, last_norm
        self.layers = nnx.List(nnx.List(layer) for layer in layers)

    def __call__(self, tokens, states=None):
        x, first, new = self.embedding_norm(self.embedding[...][tokens]), None, []
        for (norm, time, channel_norm, channel), state in zip(
            self.layers, states or [(None, None)] * len(self.layers), strict=True
        ):
            y, time_state, first = time.with_first_value(norm(x), state[0], first)
            x = x + y
            y, channel_state = channel(channel_norm(x), state[1])
            x = x + y
            new.append((time_state, channel_state))
        return self.last_norm(x) @ self.head[...].T, new

    def init_states(self, batch):
        return [(time.init_state(batch, 1), channel.init_state(batch, 1)) for _, time, _, channel in self.layers]


@functools.cache
def authors():
    t, config = golden("rwkv7").tensors, golden("rwkv7").config
    block = lambda i: under(f"blocks.{i}.", t)  # noqa: E731
    layers = [
        (
            norm(under("ln1.", block(i))),
            time_mix(under("att.", block(i)), config["head_size"]),
            norm(under("ln2.", block(i))),
            channel_mix(under("ffn.", block(i))),
        )
        for i in range(config["n_layer"])
    ]
    return Model(t["emb.weight"], norm(under("ln0.", block(0))), layers, norm(under("ln_out.", t)), t["head.weight"])


@functools.cache
def flash_linear_attention():
    t, config = golden("fla_rwkv7").tensors, golden("fla_rwkv7").config
    block = lambda i: under(f"model.layers.{i}.", t)  # noqa: E731
    turned = lambda name, x: x.T if "lora" in name else x  # noqa: E731
    named = lambda t: {FLA_TIME_MIX.get(name, name): turned(name, x) for name, x in t.items()}  # noqa: E731
    size = config["head_dim"]
    layers = [
        (
            norm(under("attn_norm.", block(i))),
            time_mix(named(under("attn.", block(i))), size, norm_eps=size * 1e-5),
            norm(under("ffn_norm.", block(i))),
            channel_mix(under("ffn.", block(i))),
        )
        for i in range(config["num_hidden_layers"])
    ]
    return Model(
        t["model.embeddings.weight"],
        norm(under("pre_norm.", block(0))),
        layers,
        norm(under("model.norm.", t)),
        t["lm_head.weight"],
    )


forward = jit(lambda model, tokens, states=None: model(tokens, states))
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}  # the authors' numpy rounds e^{-1/2} to 0.606531: 3e-5 of the logits


def test_model_of_the_authors():
    io = golden("rwkv7").io
    logits, _ = forward(authors(), io["input_ids"])
    np.testing.assert_allclose(logits, io["logits"], **TOLERANCE)


@pytest.mark.slow
def test_states_and_generation_of_the_authors():
    """Their memory is values by keys."""
    io, model = golden("rwkv7").io, authors()
    logits, states = forward(model, io["input_ids"], model.init_states(2))
    np.testing.assert_allclose(logits, io["logits"], **TOLERANCE)
    for i, (time, channel) in enumerate(states):
        np.testing.assert_allclose(time.shift[:, 0], io[f"final_state/{3 * i}"], **TOLERANCE)
        np.testing.assert_allclose(time.memory.swapaxes(2, 3), io[f"final_state/{3 * i + 1}"], **TOLERANCE)
        np.testing.assert_allclose(channel.shift[:, 0], io[f"final_state/{3 * i + 2}"], **TOLERANCE)
    logits = logits[:, -1]
    for i in range(io["gen_ids"].shape[1]):
        np.testing.assert_allclose(logits, io["gen_logits"][:, i], **TOLERANCE)
        np.testing.assert_array_equal(np.argmax(logits, axis=-1), io["gen_ids"][:, i])
        logits, states = forward(model, io["gen_ids"][:, i : i + 1], states)
        logits = logits[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["input", "long"])
def test_model_of_flash_linear_attention(tokens):
    io = golden("fla_rwkv7").io
    logits, _ = forward(flash_linear_attention(), io[f"{tokens}_ids"])
    np.testing.assert_allclose(logits, io["logits" if tokens == "input" else f"{tokens}_logits"], **TOLERANCE)


def published():
    """C = 8, N = 4, T = 6."""
    half = lambda s, *shape: 0.5 * det(s, shape)  # noqa: E731
    return {
        **{f"x_{c}": 0.5 + 0.4 * det(s, [8]) for s, c in enumerate("rwkvag", start=2)},
        **{"w0": det(8, [8]), "w1": half(10, 8, 3), "w2": half(11, 3, 8)},
        **{"a0": det(14, [8]), "a1": half(12, 8, 3), "a2": half(13, 3, 8)},
        **{"g1": half(15, 8, 3), "g2": half(16, 3, 8)},
        **{"v0": det(19, [8]), "v1": half(17, 8, 3), "v2": half(18, 3, 8)},
        **{"k_k": 0.7 + 0.1 * det(20, [8]), "k_a": 1 + 0.1 * det(21, [8]), "r_k": 0.3 * det(9, [2, 4])},
        **{
            f"{name}.weight": 0.3 * det(s, [8, 8])
            for s, name in enumerate(("receptance", "key", "value", "output"), start=22)
        },
        **{"ln_x.weight": 1 + 0.1 * det(26, [8]), "ln_x.bias": 0.1 * det(27, [8])},
    }


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("first", "total", "last", "memory", "entry"),
    [
        (None, -0.137506, (-0.138502, 0.244630, 0.220124), -0.159796, -0.192540),
        (28, -0.119875, (-0.008261, 0.239364, 0.088126), 0.101055, 0.068202),
    ],
    ids=["first_layer", "above"],
)
def test_published_time_mix(first, total, last, memory, entry):
    layer, x = time_mix(published(), 4), jnp.asarray(det(1, [1, 6, 8]), jnp.float32)
    if first is not None:
        first = FirstValue(jnp.asarray(det(first, [1, 6, 8]), jnp.float32), jnp.ones((), bool))
    y, state, _ = jit(lambda layer, x: layer.with_first_value(x, layer.init_state(1, 6), first))(layer, x)
    np.testing.assert_allclose(y.sum(), total, atol=2e-6)
    np.testing.assert_allclose(y[0, -1, :3], last, atol=2e-6)
    np.testing.assert_allclose(state.memory.sum(), memory, atol=2e-6)
    np.testing.assert_allclose(state.memory[0, 0, 1, 0], entry, atol=2e-6)


def test_published_channel_mix():
    weights = {
        "x_k": 0.5 + 0.4 * det(2, [8]),
        "key.weight": 0.3 * det(30, [16, 8]),
        "value.weight": 0.3 * det(31, [8, 16]),
    }
    y, _ = jit(channel_mix(weights))(jnp.asarray(det(1, [1, 6, 8]), jnp.float32))
    np.testing.assert_allclose(y.sum(), -0.275943, atol=2e-6)
    np.testing.assert_allclose(y[0, -1, :3], (-0.090280, 0.151170, -0.195231), atol=2e-6)


@pytest.mark.parametrize(
    ("dim", "layers", "vocab", "ranks", "count"), [(1024, 24, 65536, (64, 64, 32, 128), 450_834_432)]
)
def test_parameters_of_a_released_model(dim, layers, vocab, ranks, count):
    """Time mix, channel mix and two norms a layer; norms over the embedding and before the head; both matrices."""
    names = ("decay_rank", "rate_rank", "value_rank", "gate_rank")
    make = lambda: nnx.List(  # noqa: E731
        [
            RWKV7(dim, **dict(zip(names, ranks, strict=True)), rngs=nnx.Rngs(0)),
            RWKV7ChannelMix(dim, 4 * dim, rngs=nnx.Rngs(0)),
            LayerNorm(dim),
            LayerNorm(dim),
        ]
    )
    size = lambda make: sum(x.size for x in jax.tree.leaves(nnx.state(nnx.eval_shape(make), nnx.Param)))  # noqa: E731
    assert layers * size(make) + 2 * size(lambda: LayerNorm(dim)) + 2 * vocab * dim == count


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("index", [0, 1, 4])
def test_start(index):
    """Channel by channel from the authors' formulas; the index may be traced."""
    dim, size, count = 12, 4, 5
    make = lambda index: RWKV7(dim, head_dim=size, layer_index=index, layer_count=count, rngs=nnx.Rngs(0))  # noqa: E731
    got = jit(lambda index: parameters_of(make(index)))(index)
    want = {
        name: np.empty(dim) for name in ("mu_r", "mu_w", "mu_k", "w_proj.up.bias", "a_proj.up.bias", "v_mix.up.bias")
    }
    for n in range(dim):
        line, z = n / (dim - 1) - 0.5, (n % size - (size - 1) / 2) / ((size - 1) / 2)
        zigzag = z * abs(z)
        for name, power in (("mu_r", 0.2), ("mu_w", 0.9), ("mu_k", 0.7)):
            want[name][n] = 1 - (n / dim) ** (power * (1 - index / count))
        curve = 1 + (index / (count - 1)) ** 0.3
        want["w_proj.up.bias"][n] = -6 + 6 * (n / (dim - 1)) ** curve + 0.5 + 2.5 * zigzag
        want["a_proj.up.bias"][n] = -0.19 + 0.3 * zigzag + 0.4 * line
        want["v_mix.up.bias"][n] = 0.73 - 0.4 * line
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(got["norm.scale"], ((1 + index) / count) ** 0.7, rtol=1e-6)
    for name in ("w_proj", "a_proj", "v_mix", "g_proj"):
        assert np.abs(got[f"{name}.down.kernel"]).max() == 0
    for name, gain in (("r_proj", 1), ("v_proj", 1), ("k_proj", 0.1), ("out_proj", 0)):
        x = np.asarray(got[f"{name}.kernel"])
        np.testing.assert_allclose(x.T @ x, gain**2 * np.eye(dim), atol=1e-5)


def test_start_of_the_channel_mix():
    layer = RWKV7ChannelMix(6, 24, layer_index=1, layer_count=3, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer.mu_k[...], 1 - (np.arange(6) / 6) ** (2 / 3) ** 4, atol=1e-6)
    np.testing.assert_allclose(layer.k_proj.kernel[...] @ layer.k_proj.kernel[...].T, np.eye(6), atol=1e-5)
    assert np.abs(layer.v_proj.kernel[...]).max() == 0


def test_default_ranks():
    layer = nnx.eval_shape(lambda: RWKV7(1024, rngs=nnx.Rngs(0)))
    ranks = [p.down.kernel.shape[1] for p in (layer.w_proj, layer.a_proj, layer.v_mix, layer.g_proj)]
    assert ranks == [64, 64, 64, 160]
