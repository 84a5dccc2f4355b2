"""The Forgetting Transformer against a public implementation, and the Pro block against its formulas."""

import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import ForgettingAttention
from tests.layers.catalogue import BATCH, DIM, agree, forward, inputs, layer
from tests.layers.golden import assert_fla_model


@pytest.mark.slow
def test_fla_forgetting_transformer():
    def weights(t, config, layer):
        names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "forget_proj": "f_proj"}
        kernels = {
            f"{ours}.kernel": t[f"{theirs}.weight"].T for ours, theirs in (names | {"out_proj": "o_proj"}).items()
        }
        return kernels | {"forget_proj.bias": t["f_proj.bias"]}

    options = lambda config, layer: {"heads": config["num_heads"]}  # noqa: E731
    assert_fla_model("fla_forgetting_transformer", "fox", options, weights)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_pro_block():
    module, length = layer("fox_pro"), 20
    x = np.float64(inputs(length))
    project = lambda name: x @ np.float64(getattr(module, name).kernel[...])  # noqa: E731

    def rms(y, norm):
        y = y.reshape(*y.shape[:2], -1, 4)
        y = y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-6)
        return y * np.float64(norm.scale[...]).reshape(-1, 4)

    def shifted(y, name):
        before = np.concatenate([np.zeros_like(y[:, :1]), y[:, :-1]], axis=1)
        a = np.repeat(sigmoid(project(name)), 4, axis=-1)
        return a * before + (1 - a) * y

    q = rms(project("q_proj"), module.q_norm)
    k = np.repeat(rms(shifted(project("k_proj"), "k_shift_proj"), module.k_norm), 2, axis=2)
    v = np.repeat(shifted(project("v_proj"), "v_shift_proj").reshape(BATCH, length, 2, 4), 2, axis=2)
    f = np.cumsum(np.log(sigmoid(project("forget_proj") + np.float64(module.forget_proj.bias[...]))), axis=1)
    s = np.einsum("bihk,bjhk->bhij", q, k) / 2 + np.moveaxis(f[:, :, None] - f[:, None], 3, 1)
    p = np.tril(np.exp(s))
    o = np.einsum("bhij,bjhv->bihv", p / p.sum(-1, keepdims=True), v)
    o = rms(o.reshape(BATCH, length, -1), module.norm).reshape(BATCH, length, -1) * sigmoid(project("gate_proj"))
    agree(o @ np.float64(module.out_proj.kernel[...]), forward(module, inputs(length)))


@pytest.mark.parametrize(("argument", "options"), [("heads", {"heads": 3}), ("kv_heads", {"heads": 4, "kv_heads": 3})])
def test_options(argument, options):
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+"):
        nnx.eval_shape(lambda: ForgettingAttention(DIM, **options, rngs=nnx.Rngs(0)))
