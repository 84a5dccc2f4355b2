"""Gated slot attention: a whole public model, what its norm runs over, and options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers import GatedSlotAttention
from effattn_jax.models.blueprint import parameters_of
from tests.layers.catalogue import DIM, agree, inputs, layer, step
from tests.layers.golden import assert_fla_model, load


@pytest.mark.slow
def test_is_that_of_flash_linear_attention():
    """The eps of the config, 1e-6, is not that of the norm in its mixers, 1e-5."""

    def options(config, layer):
        return {"heads": config["num_heads"], "slots": config["num_slots"], "expand_k": config["expand_k"]}

    def weights(t, config, layer):
        ours = {f"{name}_proj": f"{name}_proj" for name in "qkvf"} | {"o_proj": "out_proj"}
        kernels = {f"{name}.kernel": t[f"{theirs}.weight"].T for theirs, name in ours.items()}
        return kernels | {"norm.scale": t["g_norm.weight"]}

    assert_fla_model("fla_gsa", "gsa", options, weights)


def test_one_token_from_nothing():
    """Slots of keys s k^T and values s v^T: with s = 1 - sigmoid(f)^(1/tau), o = (sum_m softmax(s q.k)_m s_m) v."""
    module, x = layer("gsa"), inputs(1)
    y, state = step(module, x, module.init_state(2, 1))
    w = {name: np.asarray(x, np.float64) for name, x in parameters_of(module).items()}
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    q, k, v, f = ((x[:, 0] @ w[f"{name}_proj.kernel"]).reshape(2, 2, -1) for name in "qkvf")
    q, k, v = silu(q), silu(k), silu(v)
    s = 1 - (1 + np.exp(-f)) ** -0.5
    logits = s * np.sum(q * k, -1, keepdims=True)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    o = silu(np.sum(weights * s, -1, keepdims=True) * v).reshape(2, DIM)
    o = o / np.sqrt(np.mean(o**2, -1, keepdims=True) + 0.1) * w["norm.scale"]
    agree((o @ w["out_proj.kernel"])[:, None], y)
    agree(s[..., None] * k[:, :, None], state.memory.keys)
    agree(s[..., None] * v[:, :, None], state.memory.values)


def test_groups_are_repeated_heads():
    """Keys, values and gates of two groups, for two consecutive heads each."""
    module = layer("gsa_groups")
    wide = lambda x, size: np.repeat(np.asarray(x).reshape(DIM, 2, size), 2, axis=1).reshape(DIM, -1)  # noqa: E731
    weights = dict(parameters_of(module))
    for name, size in (("k", module.key_dim), ("v", module.value_dim), ("f", module.slots)):
        weights[f"{name}_proj.kernel"] = wide(weights[f"{name}_proj.kernel"], size)
    options = {"heads": 4, "slots": 5, "gate_temperature": 2.0, "norm_eps": 0.1, "expand_k": 2.0, "expand_v": 0.5}
    full = load(lambda: GatedSlotAttention(DIM, **options, rngs=nnx.Rngs(0)), weights)
    x = inputs(3)
    want, got = step(full, x, full.init_state(2, 3)), step(module, x, module.init_state(2, 3))
    jax.tree.map(agree, want, got)


def test_starts_with_a_long_memory():
    """Gates near (1/2)^(1/8) where nothing is learned yet."""
    module = GatedSlotAttention(DIM, rngs=nnx.Rngs(0))
    assert (module.heads, module.slots, module.key_dim, module.value_dim) == (4, 64, 4, 4)
    state = jax.tree.map(jnp.ones_like, module.init_state(1, 1).memory)
    _, state = step(module, np.zeros((1, 1, DIM), np.float32), module.init_state(1, 1)._replace(memory=state))
    agree(np.full((1, 4, 64, 4), 0.5 ** (1 / 8)), state.memory.keys)


WRONG = {
    "heads: got 0": {"heads": 0},
    "kv_heads: got 3": {"kv_heads": 3},
    "expand_k: got 0.3": {"expand_k": 0.3},
    "expand_v: got -1": {"expand_v": -1},
    "slots: got 0": {"slots": 0},
    "gate_temperature: got 0": {"gate_temperature": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_options(message):
    with pytest.raises(checks.ArgumentError, match=rf"^{message}.*; needs .+") as error:
        nnx.eval_shape(lambda: GatedSlotAttention(DIM, **WRONG[message], rngs=nnx.Rngs(0)))
    assert "\n" not in str(error.value)
