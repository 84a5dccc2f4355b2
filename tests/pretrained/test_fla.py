"""Models of flash-linear-attention beyond the fixtures: blocks of softmax attention, defaults, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effattn_jax.layers import HGRN2, Attention, GatedLinearAttention
from effattn_jax.models.blueprint import blueprint, parameters_of
from effattn_jax.pretrained import from_config, load, save
from effattn_jax.pretrained.rules import rules
from effattn_jax.training.sharding import make_mesh
from effattn_jax.training.step import TrainState, loss_sum, make_train_step
from tests.compiled import jit
from tests.pretrained.fixture import fixture, header, raw

SOFTMAX = {"layers": [1, 3], "num_heads": 4, "num_kv_heads": 2, "window_size": 16, "rope_theta": 500.0}
LAYERS = {"num_hidden_layers": 4}


def config_of(name, **changed):
    return fixture(name).config | changed


def make(config):
    return from_config(config, rngs=nnx.Rngs(0))


def mixers(config):
    """Of the blocks before, in and after the pattern."""
    return [block.mixer for _, block in nnx.eval_shape(lambda: make(config)).parts()]


def drawn(config):
    """The model, with numbers that no two parameters share; nothing is compiled."""
    plan, rng = blueprint(lambda: make(config)), np.random.default_rng(0)
    return plan.model({name: jnp.asarray(rng.normal(size=x.shape), x.dtype) for name, x in plan.shapes.items()})


def tensors(config):
    """Names and shapes of what is saved."""
    return {name: rule.shape for name, rule in rules(config, blueprint(lambda: make(config))).items()}


def of_block(block, found):
    layer = f"model.layers.{block}.attn."
    return {name.removeprefix(layer): shape for name, shape in found.items() if name.startswith(layer)}


QKV = {"q_proj.weight": (32, 32), "k_proj.weight": (16, 32), "v_proj.weight": (16, 32), "o_proj.weight": (32, 32)}
BIASES = {"q_proj.bias": (32,), "k_proj.bias": (16,), "v_proj.bias": (16,)}


@pytest.mark.slow
def test_blocks_of_softmax_attention(tmp_path):
    """One group, every second block: what is written has the published names and comes back."""
    model = drawn(config_of("fla_gla", **LAYERS, attn=SOFTMAX))
    (twice, gla), (again, softmax) = model.parts()
    assert (twice, type(gla.mixer), again, type(softmax.mixer)) == (2, GatedLinearAttention, 2, Attention)
    found = softmax.mixer
    assert (found.heads, found.kv_heads, found.window, found.rope_theta) == (4, 2, 16, 500.0)
    save(model, tmp_path / "out")
    written = header(tmp_path / "out")
    assert of_block(1, written) == of_block(3, written) == QKV
    assert of_block(0, written) == of_block(2, written) == of_block(0, fixture("fla_gla").tensors)
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(load(tmp_path / "out")), strict=True):
        np.testing.assert_array_equal(one, other)


def test_groups_of_softmax_attention():
    first = {"layers": [3], "num_heads": 2, "qkv_bias": True}
    config = config_of("fla_delta_net", **LAYERS, attn=[SOFTMAX | {"layers": [0]}, first])
    found = mixers(config)
    heads = [(m.heads, m.kv_heads, m.window, m.rope_theta) for m in (found[0], found[-1])]
    assert heads == [(4, 2, 16, 500.0), (2, 2, None, 10_000.0)]
    assert [isinstance(m, Attention) for m in found] == [True, False, True]
    found = tensors(config)
    assert of_block(0, found) == QKV
    assert of_block(3, found) == dict.fromkeys(QKV, (32, 32)) | dict.fromkeys(BIASES, (32,))


def test_rwkv_with_softmax_attention():
    found = tensors(config_of("fla_rwkv7", **LAYERS, value_dim=None, attn=SOFTMAX))
    names = set(found)
    assert of_block(1, found) == QKV
    assert found["model.layers.1.ffn.key.weight"] == (48, 32)
    assert "model.layers.0.pre_norm.weight" in names
    assert not {name for name in names if name.startswith("model.layers.0.attn.v_lora")}
    assert of_block(2, found)["v_lora.lora.2.bias"] == (32,)


def test_lower_bounds_are_one_tensor(tmp_path):
    """Blocks of softmax attention have a row in it too."""
    model = drawn(config_of("fla_hgrn2", num_hidden_layers=5, attn=SOFTMAX))
    twice, _, last = (block.mixer for _, block in model.parts())
    assert isinstance(twice, HGRN2)
    assert isinstance(last, HGRN2)
    assert [name for name in parameters_of(model) if "bound" in name] == ["bounds.hgrn2"]
    save(model, tmp_path / "out")
    assert [(n, shape) for n, shape in header(tmp_path / "out").items() if "bound" in n] == [
        ("model.lower_bounds", (5, 32))
    ]
    assert raw(tmp_path / "out")["model.lower_bounds"] == np.asarray(model.bounds["hgrn2"][...]).tobytes()


def test_bounds_that_are_not_trained_have_no_tensor():
    found = tensors(config_of("fla_hgrn2", use_lower_bound=False))
    assert not [name for name in found if "bound" in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fla_hgrn", "fla_hgrn2"])
def test_a_trained_model_with_lower_bounds_is_saved(name, tmp_path):
    """A step down the gradient, which is the slope of the loss in the one tensor; the file has the published names."""
    model, rng = load(fixture(name).path), np.random.default_rng(0)
    ids = np.asarray(fixture(name).io["input_ids"], np.int32)
    where = {"segment_ids": np.zeros_like(ids[:, 1:]), "positions": np.zeros_like(ids[:, 1:]) + np.arange(36)}
    batch = where | {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
    plan, start = blueprint(lambda: model), parameters_of(model)
    (bounds,) = [key for key in start if key.startswith("bounds.")]
    optimizer = optax.sgd(0.5)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    state = TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, start), optimizer.init(start))
    state, _ = make_train_step(plan, optimizer, mesh)(state, batch)
    move = np.asarray(state.parameters[bounds] - start[bounds])
    assert np.abs(move).max() > 1e-5

    loss = jit(lambda shift: jnp.divide(*loss_sum(plan, start | {bounds: start[bounds] + shift}, batch)))
    direction = rng.standard_normal(move.shape, np.float32)
    near, far = ((float(loss(h * direction)) - float(loss(-h * direction))) / (2 * h) for h in (0.05, 0.1))
    np.testing.assert_allclose(np.sum(direction * move) / -0.5, (4 * near - far) / 3, rtol=5e-3)

    save(plan.model(state.parameters), tmp_path / "out")
    assert header(tmp_path / "out") == fixture(name).tensors
    assert raw(tmp_path / "out")["model.lower_bounds"] == np.asarray(state.parameters[bounds]).tobytes()


@pytest.mark.parametrize(
    ("layers", "block"), [([1, 4], 4), ([-1], -1), ([2, 2], 2)], ids=["beyond", "negative", "twice"]
)
def test_blocks_that_cannot_be(layers, block):
    config = config_of("fla_gla", **LAYERS, attn=SOFTMAX | {"layers": layers})
    with pytest.raises(ValueError, match=rf"^attn: got block {block}; needs each of 0 .. 3 at most once"):
        mixers(config)


DEFAULT = {
    "gla": {
        "attn.q_proj.weight": (1024, 2048),
        "attn.v_proj.weight": (2048, 2048),
        "attn.gk_proj.0.weight": (16, 2048),
        "attn.g_norm_swish_gate.weight": (512,),
        "mlp.gate_proj.weight": (5632, 2048),
    },
    "retnet": {
        "attn.q_proj.weight": (2048, 2048),
        "attn.v_proj.weight": (4096, 2048),
        "attn.g_norm_swish_gate.weight": (512,),
        "mlp.gate_proj.weight": (2816, 2048),
    },
    "delta_net": {"attn.q_conv1d.weight": (2048, 1, 4), "attn.b_proj.weight": (16, 2048), "attn.o_norm.weight": (128,)},
    "gated_deltanet": {
        "attn.q_proj.weight": (1536, 2048),
        "attn.g_proj.weight": (3072, 2048),
        "attn.o_norm.weight": (512,),
    },
    "gated_deltaproduct": {
        "attn.k_proj.weight": (1536, 2048),
        "attn.b_proj.weight": (6, 2048),
        "attn.o_norm.weight": (512,),
    },
    "kda": {
        "attn.q_proj.weight": (2048, 2048),
        "attn.f_proj.0.weight": (128, 2048),
        "attn.dt_bias": (2048,),
        "attn.A_log": (16,),
    },
    "comba": {
        "attn.v_proj.weight": (3072, 2048),
        "attn.D": (6,),
        "attn.decay": (6,),
        "attn.g_proj.weight": (3072, 2048),
    },
    "hgrn": {"attn.i_proj.weight": (2048, 2048), "model.lower_bounds": (24, 2048)},
    "hgrn2": {"attn.f_proj.weight": (2048, 2048), "attn.g_norm.weight": (2048,), "model.lower_bounds": (24, 2048)},
    "linear_attn": {"attn.feature_map_q.layer1.weight": (512, 512), "attn.norm.weight": (512,)},
    "forgetting_transformer": {"attn.k_proj.weight": (2048, 2048), "attn.f_proj.bias": (32,)},
    "path_attn": {"attn.w_proj.0.weight": (32, 2048), "attn.w_conv1d.weight": (2048, 1, 3), "attn.bt_proj.bias": (32,)},
    "nsa": {"attn.q_proj.weight": (2048, 2048), "attn.k_proj.weight": (128, 2048), "attn.g_proj.weight": (192, 2048)},
    "rwkv7": {
        "attn.w_lora.lora.0.weight": (64, 2048),
        "attn.v_lora.lora.0.weight": (16, 2048),
        "attn.g_lora.lora.0.weight": (128, 2048),
        "ffn.key.weight": (8192, 2048),
    },
}
DEPTH = {"gated_deltanet": 21, "gated_deltaproduct": 21, "comba": 21}


@pytest.mark.parametrize("kind", DEFAULT)
@pytest.mark.quick_cases(3)
def test_what_a_config_leaves_out(kind):
    """The published models of 1.3 billion parameters say little more."""
    found, depth = tensors({"model_type": kind}), DEPTH.get(kind, 24)
    for name, shape in DEFAULT[kind].items():
        assert found[name if name.startswith("model.") else f"model.layers.{depth - 1}.{name}"] == shape, name
    assert found["model.embeddings.weight"] == found["lm_head.weight"] == (32_000, 2048)
    assert f"model.layers.{depth}.attn_norm.weight" not in found


def test_names_that_depend_on_options():
    unfused = of_block(0, tensors(config_of("fla_gla", fuse_norm=False)))
    assert "g_norm.weight" in unfused
    assert "g_norm_swish_gate.weight" not in unfused
    plain = of_block(0, tensors(config_of("fla_gla", use_output_gate=False)))
    assert {"g_norm.weight", "g_proj.weight"} & set(plain) == {"g_norm.weight"}
    pro = {"qkv_bias": True, "qk_norm": True, "use_output_gate": True}
    fox = of_block(0, tensors(config_of("fla_forgetting_transformer", **pro)))
    assert {name: fox[name] for name in ("q_norm.weight", "q_proj.bias")} == {
        "q_norm.weight": (32,),
        "q_proj.bias": (32,),
    }
    assert "lm_head.weight" not in tensors(config_of("fla_kda", tie_word_embeddings=True))


REFUSED = {
    "attnres_block_size: got 2": ("fla_gla", {"attnres_block_size": 2}),
    "hidden_act: got 'powlu'": ("fla_kda", {"hidden_act": "powlu"}),
    "use_short_conv: got False": ("fla_delta_net", {"use_short_conv": False}),
    "use_short_conv: got True": ("fla_gsa", {"use_short_conv": True}),
    "feature_map: got 'relu'": ("fla_gsa", {"feature_map": "relu"}),
    "num_kv_heads: got 1": ("fla_retnet", {"num_kv_heads": 1}),
    "feature_map: got 'hedgehog'": ("fla_linear_attn", {"feature_map": "hedgehog"}),
    "window_size: got 8": ("fla_forgetting_transformer", {"window_size": 8}),
    "window_size: got 0": ("fla_nsa", {"window_size": 0}),
    "norm_bias: got False": ("fla_rwkv6", {"norm_bias": False}),
    "expand_k: got 0.5": ("fla_rwkv6", {"expand_k": 0.5}),
    r"value_dim: got \[64, 64\]": ("fla_rwkv7", {"value_dim": [64, 64]}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    name, changed = REFUSED[message]
    with pytest.raises(ValueError, match=f"^{message}; needs .+") as error:
        mixers(config_of(name, **changed))
    assert "\n" not in str(error.value)


def test_sizes_are_rounded_up():
    """A config with a ratio for its feed-forward layers and no size."""
    config = config_of("fla_gla", intermediate_size=None, hidden_size=64)
    assert tensors(config)["model.layers.0.mlp.up_proj.weight"] == (256, 64)
    config = config_of("fla_rwkv6", intermediate_size=None, hidden_ratio=3.5)
    assert tensors(config)["model.layers.0.ffn.key.linear.weight"] == (128, 32)
