"""Numbers from elsewhere: a brute-force table in float64, and arrays of public references."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.dense import masked
from tests.compiled import jit
from tests.sparse.inputs import attend

OPS = Path(__file__).parent.parent / "fixtures" / "ops"
IMPLEMENTATIONS = ("xla", "dense")
DIGITS = 6e-7  # the table is rounded to six digits


def waves():
    i, c = np.arange(32)[:, None], np.arange(4)[None, :]
    q = 2 * np.sin(0.7 * i + 1.3 * c + 0.1)
    k = 2 * np.cos(0.5 * i - 0.9 * c + 0.2)
    v = np.sin(0.3 * i + 0.4 * c)
    return [jnp.asarray(x[None, :, None, :], jnp.float64) for x in (q, k, v)]


TABLE = {
    "dense": ({}, (0.251920, 0.257356, 0.222161, 0.151891), 4.589892, 36.902494),
    "window": ({"window": 5}, (0.238839, -0.147148, -0.509904, -0.792157), 1.728072, 23.619345),
    "sink": ({"sinks": 0.5}, (0.247772, 0.253118, 0.218503, 0.149390), 4.606495, 33.481018),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("row", TABLE)
def test_table(row, implementation):
    options, last, last_lse, total = TABLE[row]
    with jax.enable_x64(True):
        if "sinks" in options:
            options = {"sinks": jnp.array([options["sinks"]], jnp.float64)}
        out, lse = attend(*waves(), scale=0.5, implementation=implementation, return_lse=True, **options)
        np.testing.assert_allclose(out[0, 31, 0], last, rtol=0, atol=DIGITS)
        np.testing.assert_allclose(lse[0, 31, 0], last_lse, rtol=0, atol=DIGITS)
        np.testing.assert_allclose(out.sum(), total, rtol=0, atol=DIGITS)


A_SHAPE = (0.223842, -0.132922, -0.468701, -0.730482), 41.571064


def test_first_keys_and_window_by_mask():
    i, j = np.arange(32)[:, None], np.arange(32)[None, :]
    mask = (j <= i) & ((j < 2) | (i - j < 4))
    with jax.enable_x64(True):
        out, _ = masked(*waves(), jnp.asarray(mask[None]), scale=0.5)
        np.testing.assert_allclose(out[0, 31, 0], A_SHAPE[0], rtol=0, atol=DIGITS)
        np.testing.assert_allclose(out.sum(), A_SHAPE[1], rtol=0, atol=DIGITS)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_first_keys_and_window_by_merging(implementation):
    """Disjoint parts merge by their log-sum-exps: from row 5 on the first two keys are outside of the window of 4."""
    options = {"scale": 0.5, "implementation": implementation, "return_lse": True}
    with jax.enable_x64(True):
        q, k, v = waves()
        near, near_lse = attend(q, k, v, window=4, **options)
        rows = q[0, :, None]  # a batch of single queries, each after the two keys
        far, far_lse = attend(rows, *(jnp.repeat(x[:, :2], 32, axis=0) for x in (k, v)), **options)
        far, far_lse = far[None, :, 0], far_lse[None, :, 0]
        both = jnp.logaddexp(near_lse, far_lse)
        out = jnp.exp(near_lse - both)[..., None] * near + jnp.exp(far_lse - both)[..., None] * far
        out = out.at[:, :5].set(attend(q, k, v, **options)[0][:, :5])  # there the two parts are all of the past
        np.testing.assert_allclose(out[0, 31, 0], A_SHAPE[0], rtol=0, atol=DIGITS)
        np.testing.assert_allclose(out.sum(), A_SHAPE[1], rtol=0, atol=DIGITS)


BLOCK_MAXIMA = (0.109473, 0.142887, 0.132972, 0.040467)  # of the last row's weights, in blocks of 8


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_greatest_weights_of_blocks(implementation):
    """Values that are one-hot make the output the row of weights."""
    with jax.enable_x64(True):
        q, k, _ = waves()
        weights = attend(q, k, jnp.eye(32)[None, :, None], scale=0.5, implementation=implementation)
        np.testing.assert_allclose(weights[0, 31, 0].reshape(4, 8).max(-1), BLOCK_MAXIMA, rtol=0, atol=DIGITS)


def test_greatest_weights_of_blocks_by_log_sum_exps():
    """A block by itself, and what it is of the whole row: e^{L_n - L} max_j p_nj."""
    with jax.enable_x64(True):
        q, k, v = waves()
        _, whole = attend(q, k, v, scale=0.5, return_lse=True)
        row = jnp.repeat(q[:, 31:], 4, axis=1)
        blocks = np.arange(4)[None, :, None, None]
        run = jit(lambda *x: block_attention(*x, block_size=8, causal=False, scale=0.5))
        weights, lse = run(row, k, jnp.eye(32)[None, :, None], blocks)
        greatest = jnp.exp(lse[0, :, 0] - whole[0, 31, 0]) * weights[0, :, 0].max(-1)
        np.testing.assert_allclose(greatest, BLOCK_MAXIMA, rtol=0, atol=DIGITS)


OPTIONS = {
    "window_sink_attn": {"window": 9},
    "softcap_window_attn": {"window": 9, "logits_soft_cap": 2.0, "scale": 0.3},
}
FILES = [("window_sink_attn", x) for x in ("T1", "T64", "T65")] + [("softcap_window_attn", x) for x in ("T1", "T65")]


def assert_near(want, got):
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("file", "case"), FILES)
@pytest.mark.quick_cases(1)
def test_public_references(file, case, implementation):
    with np.load(OPS / f"{file}.npz") as data:
        arrays = {key.split("/", 1)[1]: data[key] for key in data if key.startswith(f"{case}/")}
    names = {"in/q": "q", "in/k": "k", "in/v": "v", "in/sink": "sinks"}
    inputs = {names[key]: jnp.asarray(x) for key, x in arrays.items() if key in names}

    def loss(inputs):
        out = attend(**inputs, implementation=implementation, **OPTIONS[file])
        return jnp.sum(out * arrays.get("cot/o", 0)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    assert_near(arrays["out/o"], out)
    if "cot/o" in arrays:
        for name, gradient in gradients.items():
            assert_near(arrays["grad/" + name.removesuffix("s")], gradient)
