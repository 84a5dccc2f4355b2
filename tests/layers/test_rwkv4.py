"""RWKV-4: one layer by hand, where weights start, and a block in two calls."""

import jax
import numpy as np
import pytest
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers import RWKV4
from effattn_jax.models import Block
from effattn_jax.models.blueprint import parameters_of
from tests.layers.catalogue import DIM, agree, filled, forward, inputs, jit, layer, step


def test_by_hand():
    """Sums of exponentials as they are, in float64."""
    module, x = layer("rwkv4"), inputs(9).astype(np.float64)
    w = {name: np.asarray(x, np.float64) for name, x in parameters_of(module).items()}
    before = np.concatenate([np.zeros((2, 1, DIM)), x[:, :-1]], 1)
    r, k, v = ((w[f"mu_{c}"] * x + (1 - w[f"mu_{c}"]) * before) @ w[f"{c}_proj.kernel"] for c in "rkv")
    o = np.zeros(v.shape)
    for t in range(9):
        age = t - 1 - np.arange(t)[:, None]
        weights = np.exp(k[:, : t + 1] + np.concatenate([-np.exp(w["w"]) * age, w["u"][None]]))
        o[:, t] = (weights * v[:, : t + 1]).sum(1) / weights.sum(1)
    agree((o / (1 + np.exp(-r))) @ w["out_proj.kernel"], forward(module, inputs(9)))


@pytest.mark.slow
def test_block_in_two_calls_is_one_pass():
    """With the channel mix that goes with it, each with a state of its own."""
    make = lambda: Block(  # noqa: E731
        DIM, "rwkv4", {}, mlp="rwkv5_channel_mix", mlp_dim=24, layer_index=1, layer_count=2, rngs=nnx.Rngs(0)
    )
    block = filled(make)
    first, state = step(block, inputs(9)[:, :4], block.init_state(2, 9))
    second, _ = step(block, inputs(9)[:, 4:], state)
    agree(forward(block, inputs(9)), np.concatenate([first, second], axis=1))


@pytest.mark.parametrize("index", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_where_it_starts(index):
    """Channel by channel from the authors' formulas; the index may be traced."""
    count = 5
    make = lambda index: RWKV4(DIM, layer_index=index, layer_count=count, rngs=nnx.Rngs(0))  # noqa: E731
    got = jit(lambda index: parameters_of(make(index)))(index)
    height, rest, n = index / (count - 1), 1 - index / count, np.arange(DIM)
    want = {
        "w": -5 + 8 * (n / (DIM - 1)) ** (0.7 + 1.3 * height),
        "u": np.log(0.3) + np.resize([0, 0.5, -0.5], DIM),
        "mu_k": (n / DIM) ** rest,
        "mu_v": (n / DIM) ** rest + 0.3 * height,
        "mu_r": (n / DIM) ** (0.5 * rest),
    }
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, atol=2e-6)
    for name in "rk":
        assert not np.any(got[f"{name}_proj.kernel"])
    assert not np.any(got["out_proj.kernel"])
    kernel = np.asarray(got["v_proj.kernel"])
    np.testing.assert_allclose(kernel.T @ kernel, np.eye(DIM), atol=2e-6)


@pytest.mark.parametrize("w", [6.0, 100.0])
@pytest.mark.quick_cases(1)
def test_a_decay_beyond_float32(w):
    """Such a memory holds the last token; gradients are numbers."""
    module = filled(lambda: RWKV4(DIM, rngs=nnx.Rngs(0)))
    module.w[...] = np.full((DIM,), w, np.float32)
    gradients = jit(jax.grad(lambda module, x: module(x)[0].sum()))(module, inputs(9))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    _, state = step(module, inputs(9), module.init_state(2, 9))
    np.testing.assert_allclose(state.memory.denominator, 1, atol=1e-6)


def test_bad_options():
    with pytest.raises(checks.ArgumentError, match=r"^width: got 0; needs at least 1"):
        nnx.eval_shape(lambda: RWKV4(DIM, width=0, rngs=nnx.Rngs(0)))
