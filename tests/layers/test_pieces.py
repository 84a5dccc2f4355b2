"""Norms, rotations, convolutions and feed-forward layers against their formulas in numpy, float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import GatedMLP, Mamba2, Projection, RMSNorm, ShortConvolution, rope
from effattn_jax.layers.documents import continues, first_document, last_document
from tests.layers.catalogue import agree, filled, jit, random


def value(variable):
    return np.asarray(variable[...], np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rms_norm(groups):
    x = random("norm", 2, 3, 8) * np.float32(1e-2)  # small enough for eps to matter
    norm = filled(lambda: RMSNorm(8, groups=groups, eps=1e-5))
    want = np.empty(x.shape)
    for index in np.ndindex(2, 3, groups):
        part = (*index[:2], slice(index[2] * 8 // groups, (index[2] + 1) * 8 // groups))
        want[part] = x[part] / np.sqrt(np.mean(np.float64(x[part]) ** 2) + 1e-5)
    agree(want * value(norm.scale), jit(norm)(x), limit=1e-6)


def test_rms_norm_squares_in_float32():
    x = jnp.full((1, 4), 3e30, jnp.bfloat16) * jnp.array([1, -1, 1, -1], jnp.bfloat16)
    y = RMSNorm(4, dtype=jnp.bfloat16)(x * 1e-13)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), [[1, -1, 1, -1]])


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.75])
def test_rope(fraction):
    x, theta = random("rope", 2, 5, 3, 8), 100.0
    positions = np.array([[0, 1, 2, 3, 4], [-2, 7, 7, 1000, 12345]])
    half = int(8 * fraction) // 2
    want = x.astype(np.float64)
    for b, t, i in np.ndindex(2, 5, half):
        angle = positions[b, t] * theta ** (-2 * i / (2 * half))
        first, second = x[b, t, :, i].astype(np.float64), x[b, t, :, i + half].astype(np.float64)
        want[b, t, :, i] = first * np.cos(angle) - second * np.sin(angle)
        want[b, t, :, i + half] = second * np.cos(angle) + first * np.sin(angle)
    # angles are float32: 12345 radians are known to 5e-4
    agree(want[0], rope(x, positions, theta=theta, fraction=fraction)[0], limit=1e-6)
    np.testing.assert_allclose(rope(x, positions, theta=theta, fraction=fraction)[1], want[1], atol=4e-3)


def erf(x):
    return np.vectorize(math.erf)(x)


ACTIVATIONS = {
    "silu": silu,
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_mlp(activation):
    options = {"activation": activation, "bias": activation != "silu"}
    layer, x = filled(lambda: GatedMLP(6, 10, **options, rngs=nnx.Rngs(0))), random("gated", 2, 3, 6)
    affine = lambda p, x: x @ value(p.kernel) + (0 if p.bias is None else value(p.bias))  # noqa: E731
    gated = ACTIVATIONS[activation](affine(layer.gate, x)) * affine(layer.up, x)
    agree(affine(layer.down, gated), jit(layer)(x), limit=1e-6)


def test_an_activation_that_is_not_there():
    with pytest.raises(ValueError, match="activation: got 'elu'; needs one of silu, gelu, gelu_tanh"):
        GatedMLP(6, 10, activation="elu", rngs=nnx.Rngs(0))


def test_projection_with_bias():
    layer = filled(lambda: Projection(6, 10, ("embed", "mlp"), bias=True, rngs=nnx.Rngs(0)))
    x = random("projection", 2, 3, 6)
    agree(x @ value(layer.kernel) + value(layer.bias), jit(layer)(x), limit=1e-6)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("activation", [jax.nn.silu, jnp.tanh])
def test_short_convolution(width, activation):
    layer = filled(lambda: ShortConvolution(3, width, activation=activation, rngs=nnx.Rngs(0)))
    x, ids = random("conv", 2, 9, 3), np.array([[0, 0, 0, 1, 2, 2, 2, 2, 2], [-1, -1, 4, 4, 4, 4, 5, 5, -1]])
    before = random("before", 2, width - 1, 3)
    documents = (None, ids)
    for state in (None, before):
        for given in documents:
            want = np.empty(x.shape)
            for b, t in np.ndindex(2, 9):
                total = value(layer.bias).copy()
                own = lambda s, b=b, t=t, given=given: given is None or given[b, s] == given[b, t]  # noqa: E731
                first = 0 if given is None else int(np.argmax(given[b] >= 0))
                for i in range(width):
                    s = t - width + 1 + i
                    if s >= first and own(s):
                        total += value(layer.taps)[i] * x[b, s]
                    elif s < first and state is not None and own(first) and t >= first:
                        total += value(layer.taps)[i] * state[b, width - 1 - (first - s)]
                want[b, t] = silu(total) if activation is jax.nn.silu else np.tanh(total)
            y, tail = jit(lambda layer, x, s, ids: layer(x, s, segment_ids=ids))(layer, x, state, given)
            real = np.ones(ids.shape, bool) if given is None else ids >= 0
            agree(want[real], np.asarray(y)[real], limit=1e-6)
            if state is None:
                assert tail is None
                continue
            for b in range(2):
                kept = x[b] if given is None else x[b, given[b] == given[b].max()]
                if given is None or given[b].max() == given[b][given[b] >= 0][0]:
                    kept = np.concatenate([state[b], kept])
                kept = np.concatenate([np.zeros((width, 3)), kept])[len(kept) + 1 :]
                np.testing.assert_array_equal(tail[b], kept[: width - 1])


def test_documents():
    ids = np.array([[0, 0, 1], [-1, 3, 3], [2, -1, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(first_document(ids), [0, 3, 2, -1])
    np.testing.assert_array_equal(last_document(ids, np.array([7, 7, 7, 7])), [1, 3, 2, 7])
    for held, same in (([0, 3, 2, 5], [1, 1, 1, 1]), ([-1, -1, -1, -1], [1, 1, 1, 1]), ([1, 2, 0, 0], [0, 0, 0, 1])):
        np.testing.assert_array_equal(continues(ids, np.array(held)), np.bool(same))


def test_mamba2_starts_with_decays_of_the_paper():
    """A in -(1, 16), dt in (1e-3, 1e-1) where its projection is 0."""
    layer = Mamba2(32, expand=4, head_dim=1, state_dim=2, rngs=nnx.Rngs(0))
    dt = np.log1p(np.exp(value(layer.dt_bias)))
    decay = np.exp(value(layer.A_log))
    assert 1 <= decay.min() < 2.5 < 14 < decay.max() <= 16
    assert 1e-3 * 0.999 <= dt.min() < 2e-3 < 5e-2 < dt.max() <= 1e-1 * 1.001
    np.testing.assert_array_equal(value(layer.D), 1)
