"""Layers of the delta rules: what they become where their gates are alike, their gates, wrong options."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import Comba, DeltaNet, GatedDeltaNet, GatedDeltaNet2, GatedDeltaProduct, KimiDeltaAttention
from effattn_jax.layers.decay_gate import DecayGate
from effattn_jax.layers.delta_net import ACTIVATIONS, sum_norm
from effattn_jax.models.blueprint import parameters_of
from tests.layers.catalogue import agree, filled, inputs, jit, random, step
from tests.layers.golden import load

DIM, HEADS, HEAD_DIM = 16, 2, 4


def parameters(layer, **options):
    """Random ones, the same for the same names and shapes."""
    module = filled(lambda: layer(DIM, heads=HEADS, head_dim=HEAD_DIM, **options, rngs=nnx.Rngs(0)))
    return parameters_of(module)


def run(layer, own, **options):
    module = load(lambda: layer(DIM, heads=HEADS, head_dim=HEAD_DIM, **options, rngs=nnx.Rngs(0)), own)
    y, state = step(module, inputs(70), module.init_state(2, 70))
    return y, state.memory


def outputs(layer, own, **options):
    return np.concatenate([x.reshape(-1) for x in run(layer, own, **options)])


@pytest.mark.slow
def test_one_householder_is_gated_delta_net():
    options = {"allow_negative_eigenvalues": True}
    own = parameters(GatedDeltaNet, **options)
    agree(outputs(GatedDeltaNet, own, **options), outputs(GatedDeltaProduct, own, householders=1, **options))


def test_gated_delta_net_that_keeps_all_is_delta_net():
    gated = parameters(GatedDeltaNet, expand_v=1.0) | {"decay.A_log": np.full(HEADS, -200, np.float32)}
    plain = {name: x for name, x in gated.items() if not name.startswith(("a_proj", "decay"))}
    agree(outputs(DeltaNet, plain, output_gate=True), outputs(GatedDeltaNet, gated, expand_v=1.0))


@pytest.mark.slow
def test_feedback_of_the_key_is_delta_net():
    """p = k in a Comba that keeps all."""
    comba = {"expand_v": 1.0, "inner_decay": False, "output_correction": None, "output_gate": False}
    own = parameters(Comba, **comba) | {"decay.A_log": np.full(HEADS, -200, np.float32)}
    plain = {name: x for name, x in own.items() if not name.startswith(("a_proj", "decay"))}
    agree(outputs(DeltaNet, plain), outputs(Comba, own, **comba))


@pytest.mark.slow
def test_feedback_of_the_decayed_key_is_gated_delta_net():
    """A constant decay e^g = sigmoid(d) makes p = e^g k, which reads the memory as if it had decayed."""
    comba = {"output_correction": None, "output_gate": False}
    own = parameters(Comba, **comba)
    d = np.float32([0.3, -0.4])
    own |= {"a_proj.kernel": 0 * own["a_proj.kernel"], "d": d, "decay.dt_bias": np.full(HEADS, 20, np.float32)}
    own["decay.A_log"] = np.log(np.log1p(np.exp(-d)) / 20)
    gated = {name: x for name, x in own.items() if name != "d"}
    agree(outputs(GatedDeltaNet, gated, output_gate=False), outputs(Comba, own, **comba))


@pytest.mark.slow
def test_erasing_what_is_written_is_kda():
    """Gated DeltaNet 2 with b = w = beta in all channels of a head."""
    own = parameters(KimiDeltaAttention)
    beta = np.repeat(own["b_proj.kernel"], HEAD_DIM, axis=1)
    both = own | {"b_proj.kernel": beta, "w_proj.kernel": beta}
    agree(outputs(KimiDeltaAttention, own), outputs(GatedDeltaNet2, both))


@pytest.mark.slow
def test_kda_with_equal_channels_is_gated_delta_net():
    """The memory alone: the output gates are not the same."""
    kda = parameters(KimiDeltaAttention, gate_rank=HEADS)
    a, bias = kda["f_proj.down.kernel"], kda["decay.dt_bias"][:HEADS]
    kda |= {
        "f_proj.up.kernel": np.repeat(np.eye(HEADS, dtype=np.float32), HEAD_DIM, axis=1),
        "decay.dt_bias": np.repeat(bias, HEAD_DIM),
    }
    gated = {name: x for name, x in kda.items() if not name.startswith(("f_proj", "g_proj"))}
    gated |= {"a_proj.kernel": a, "decay.dt_bias": bias}
    _, want = run(GatedDeltaNet, gated, expand_v=1.0, output_gate=False)
    agree(want, run(KimiDeltaAttention, kda, gate_rank=HEADS)[1])


@pytest.mark.parametrize("bound", [None, -5.0])
def test_decay_gate(bound):
    gate = filled(lambda: DecayGate(2, 3, lower_bound=bound, rngs=nnx.Rngs(0)))
    x = random("gate", 2, 5, 6)
    rate = np.exp(np.asarray(gate.A_log[...], np.float64))[:, None]
    x64 = (np.float64(x) + np.asarray(gate.dt_bias[...])).reshape(2, 5, 2, 3)
    want = -rate * np.log1p(np.exp(x64)) if bound is None else bound / (1 + np.exp(-rate * x64))
    agree(want, jit(gate)(x), limit=1e-6)


def test_decay_gates_start_as_published():
    slow = DecayGate(400, slowest=0.01, rngs=nnx.Rngs(0))
    assert 0.01 <= np.exp(slow.A_log[...]).min() < 1 < 15 < np.exp(slow.A_log[...]).max() <= 16
    dt = np.log1p(np.exp(np.asarray(slow.dt_bias[...], np.float64)))
    assert 1e-3 * 0.999 <= dt.min() < 2e-3 < 5e-2 < dt.max() <= 1e-1 * 1.001
    bounded = DecayGate(4, 2, lower_bound=-5.0, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(bounded.A_log[...], 0)
    assert bounded.dt_bias.shape == (8,)


@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_sum_norm(activation):
    x = np.asarray(ACTIVATIONS[activation](random("sum", 3, 8)))
    assert x.min() >= 0
    agree(np.ones(3), jnp.sum(sum_norm(x), axis=-1))
    agree(x / x.sum(-1, keepdims=True), sum_norm(x))
    np.testing.assert_array_equal(sum_norm(np.zeros((1, 4), np.float32)), 0)


WRONG = {
    "qk_activation: got 'gelu'": (DeltaNet, {"qk_activation": "gelu"}),
    "qk_norm: got 'rms'": (DeltaNet, {"qk_norm": "rms"}),
    "qk_norm: got 'sum' after 'silu'": (DeltaNet, {"qk_norm": "sum"}),
    "heads: got 0": (GatedDeltaNet, {"heads": 0}),
    "heads: got 2 heads": (GatedDeltaNet, {"value_heads": 3}),
    "head_dim: got 0": (GatedDeltaNet, {"head_dim": 0}),
    "expand_v: got 0.3": (KimiDeltaAttention, {"expand_v": 0.3}),
    "expand_v: got 0": (KimiDeltaAttention, {"expand_v": 0}),
    "lower_bound: got 0.0": (KimiDeltaAttention, {"lower_bound": 0.0}),
    "householders: got 0": (GatedDeltaProduct, {"householders": 0}),
    "width: got 0": (Comba, {"conv_width": 0}),
}


@pytest.mark.parametrize("message", WRONG)
def test_options(message):
    layer, options = WRONG[message]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        nnx.eval_shape(lambda: layer(DIM, **{"heads": HEADS, "head_dim": HEAD_DIM} | options, rngs=nnx.Rngs(0)))
    assert "\n" not in str(error.value)
