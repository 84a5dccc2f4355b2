"""The memory of Mamba-3 against the printed golden, its reduction to Mamba-2, and the sum of its angles."""

import functools

import jax
import numpy as np
import pytest

from effattn_jax.linear import mamba3, scalar_decay
from effattn_jax.linear.mamba3 import summed, wrapped
from tests.linear.det import det, heads
from tests.linear.draw import draw_qkv, log_decays
from tests.linear.engines import every_form
from tests.linear.suite import Sizes, jit
from tests.ratio import FLOAT32, assert_close, error_ratio

T, K, V = 8, 4, 3
run = jit(mamba3, static_argnames="form")


@pytest.mark.quick_cases(3)
@every_form
def test_golden(form):
    dt = np.logaddexp(0, det(19, (T,)) - 1)
    q, k = det(1, (T, K)) + 1 + 0.1 * det(23, (K,)), det(2, (T, K)) + 1 + 0.1 * det(24, (K,))
    v, g = det(3, (T, V)), -(0.3 + 0.2 * det(20, (T,))) * dt
    mix, angle = 1 / (1 + np.exp(-det(21, (T,)))), np.tanh(det(22, (T, 1))) * np.pi * dt[:, None]
    with jax.enable_x64(True):
        gates = [x[None, :, None] for x in (g, dt, mix, angle)]
        out, state = run(heads(q), heads(k), heads(v), *gates, form=form)
    out, matrix = np.asarray(out)[0, :, 0] + 0.9 * v, np.asarray(state.matrix)[0, 0]
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=5.1e-7)
    close(out.sum(), 27.339441)
    close(out[-1], [-0.492961, 1.414029, 2.810972])
    close([matrix.sum(), matrix[0, 0]], [3.803295, -0.311993])


@pytest.mark.quick_cases(3)
@every_form
@pytest.mark.parametrize("strength", ["mild", "strong"])
def test_later_token_alone_without_angles_is_mamba2(form, strength):
    rng, sizes = np.random.default_rng(0), Sizes(length=70)
    x, shape = draw_qkv(rng, sizes), (2, 70, 4)
    dt, g = rng.uniform(0.1, 2, shape).astype(np.float32), log_decays(rng, shape, strength)
    out, state = run(**x, log_decay=g, dt=dt, mix=np.ones_like(dt), angle=np.zeros((*shape, 3), np.float32), form=form)
    want = jit(scalar_decay, static_argnames="scale")(x["q"], x["k"], x["v"] * dt[..., None], g, scale=1.0)
    assert_close(want, (out, state.matrix), FLOAT32)


def test_sum_of_angles_keeps_its_precision():
    """10 000 tokens of up to half a turn each."""
    turns = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 10_000, 1, 2)).astype(np.float32) + np.float32(0.2)
    got = np.asarray(jit(summed)(turns, np.zeros((1, 1, 2), np.float32), None), np.float64)[:, 1:]
    off = got - np.cumsum(turns, axis=1, dtype=np.float64)
    assert np.abs(off - np.round(off)).max() < 1e-5
    assert np.abs(got).max() <= 0.5
    np.testing.assert_array_equal(jax.grad(lambda x: wrapped(x * 3.0))(0.4), 3)


@pytest.mark.quick_cases(2)
@every_form
def test_whole_turns_change_nothing(form):
    rng = np.random.default_rng(1)
    x = {name: x.astype(np.float64) for name, x in draw_qkv(rng, Sizes(length=20)).items()}
    shape = (2, 20, 4)
    gates = {"log_decay": -rng.uniform(0, 1, shape), "dt": np.ones(shape), "mix": rng.uniform(0, 1, shape)}
    angle = rng.standard_normal((*shape, 3))
    with jax.enable_x64(True):
        out, state = run(**x, **gates, angle=angle, form=form)
        again, same = run(**x, **gates, angle=angle + 2 * np.pi * rng.integers(-3, 4, angle.shape), form=form)
        assert_close((out, state.matrix), (again, same.matrix), 1e-9)
        still, _ = run(**x, **gates, angle=0 * angle, form=form)
    assert error_ratio(still, out) > 0.1


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_kernel(dtype):
    """A kernel takes queries and keys in the dtype of the values, turned before they are rounded."""
    rng = np.random.default_rng(0)
    given = draw_qkv(rng, Sizes(7, 64, 64, batch=1, heads=(2, 2, 2)))
    shape = given["v"].shape[:3]
    gates = {"log_decay": log_decays(rng, shape, "strong"), "dt": rng.uniform(0, 1, shape).astype(np.float32)}
    gates |= {"mix": rng.uniform(0, 1, shape).astype(np.float32)}
    gates |= {"angle": rng.standard_normal((*shape, 8), np.float32)}
    want, _ = mamba3(**given, **gates, form="recurrent")
    given = {name: x.astype(dtype) for name, x in given.items()}
    got, _ = mamba3(**given, **gates, form="chunkwise", implementation="mosaic_tpu")
    assert got.dtype == dtype
    assert_close(want, got.astype("float32"), FLOAT32 if dtype == "float32" else 0.008)  # inputs round, too
