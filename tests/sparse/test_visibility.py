"""Which keys a row reads: counts, causality, rows without keys, padding, and the tiles that are never touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention
from tests.ratio import assert_close
from tests.sparse.inputs import attend, documents, qkv, sink_logits

IMPLEMENTATIONS = ("xla", "dense")


def weights(implementation, length, keys, **options):
    """Uniform weights over the keys that each row reads: values are one-hot, logits are zero."""
    q, k = np.zeros((1, length, 1, 4), np.float32), np.zeros((1, keys, 1, 4), np.float32)
    v = np.eye(keys, dtype=np.float32)[None, :, None, :]
    return np.asarray(attend(q, k, v, implementation=implementation, **options)[0, :, 0])


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [1, 2, 64, 1000])
def test_a_row_reads_window_keys_with_its_own(window, implementation):
    read = weights(implementation, 150, 170, window=window)
    for row in range(150):
        own = row + 20
        visible = np.flatnonzero(read[row])
        np.testing.assert_array_equal(visible, np.arange(max(0, own - window + 1), own + 1))
        np.testing.assert_allclose(read[row, visible], 1 / len(visible), rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_window_without_causality_reads_both_sides(implementation):
    read = weights(implementation, 100, 100, window=3, causal=False)
    distance = np.abs(np.arange(100)[:, None] - np.arange(100)[None, :])
    np.testing.assert_array_equal(read > 0, distance < 3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.quick_cases(1)
def test_gradients_of_a_row_stay_in_its_past(window, implementation):
    q, k, v = qkv(130, batch=1)
    row = 70
    loss = lambda arrays: attention(*arrays, window=window, implementation=implementation)[:, row].sum()  # noqa: E731
    dq, dk, dv = jax.jit(jax.grad(loss))((q, k, v))
    first = 0 if window is None else row - window + 1
    for gradient, low in ((dq, row), (dk, first), (dv, first)):
        size = np.max(np.abs(gradient), axis=(0, 2, 3))
        assert np.all(size[:low] == 0)
        assert np.all(size[low : row + 1] > 0)
        assert np.all(size[row + 1 :] == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sinks", [None, sink_logits()], ids=["no sinks", "sinks"])
@pytest.mark.quick_cases(1)
def test_rows_without_keys_are_zero(sinks, implementation):
    q, k, v = qkv(70, batch=1)
    padding = np.arange(70) % 5 == 0
    ids = np.where(padding, -3, 4)[None]
    garbage = np.where(padding[None, :, None, None], np.float32(np.nan), np.float32(0))

    def loss(arrays):
        arrays = [x + garbage for x in arrays]
        outputs = attention(*arrays, sinks=sinks, segment_ids=ids, implementation=implementation, return_lse=True)
        return jnp.sum(outputs[0] ** 2), outputs

    (_, (out, lse)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))((q, k, v))
    out, lse = np.asarray(out), np.asarray(lse)
    assert np.all(out[:, padding] == 0)
    np.testing.assert_array_equal(lse[0, 0], np.full(4, -np.inf) if sinks is None else sinks)
    alone = attend(*(x[:, ~padding] for x in (q, k, v)), sinks=sinks, return_lse=True)
    assert_close(alone, (out[:, ~padding], lse[:, ~padding]), 1e-6)
    for gradient in map(np.asarray, gradients):
        assert np.all(np.isfinite(gradient))
        assert np.all(gradient[:, padding] == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_alone_makes_no_nan(implementation):
    q, k, v = qkv(65)
    ids = jnp.full((2, 65), -1)

    def loss(arrays):
        out, lse = attention(*arrays, segment_ids=ids, implementation=implementation, return_lse=True)
        return jnp.sum(out), (out, lse)

    with jax.debug_nans(True):
        gradients, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))((q, k, v))
    assert bool(jnp.all(jnp.isneginf(lse)))
    for x in (out, *gradients):
        assert bool(jnp.all(x == 0))


def test_packed_documents_do_not_see_each_other():
    ids = documents(101, batch=1)
    read = weights("xla", 101, 101, segment_ids=ids)
    same = (ids[0][:, None] == ids[0][None, :]) & (ids[0] >= 0) & np.tri(101, dtype=bool)
    np.testing.assert_array_equal(read > 0, same)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_logits_do_not_reach_hidden_keys(implementation):
    """All visible logits near -1e5: a mask that only subtracts a large number would leak."""
    q, k = jnp.full((1, 80, 1, 1), 1.0), jnp.full((1, 80, 1, 1), -1e5)
    k = k.at[:, 40:].set(0)
    v = jnp.arange(80.0)[None, :, None, None]
    out = attend(q, k, v, scale=1.0, window=8, implementation=implementation)
    np.testing.assert_allclose(out[0, 7:40, 0, 0], np.arange(7, 40) - 3.5, rtol=1e-6)


@pytest.mark.slow
def test_tiles_above_the_diagonal_are_not_read():
    """Not a number there would reach every row that touches it, were it under a weight of zero."""
    q, k, v = qkv(1024, batch=1)
    spoiled = [jnp.asarray(x).at[:, 512:].set(jnp.nan) for x in (k, v)]
    run = jax.jit(jax.value_and_grad(lambda arrays: attention(*arrays, implementation="xla")[:, :512].sum()))
    value, _ = run((q, *spoiled))
    assert bool(jnp.isfinite(value))


def test_tiles_outside_of_the_window_are_not_read():
    q, k, v = qkv(600, batch=1)
    spoiled = [jnp.asarray(x).at[:, :200].set(jnp.nan).at[:, 500:].set(jnp.nan) for x in (k, v)]
    out = attend(q, *spoiled, window=64, implementation="xla")
    assert bool(jnp.all(jnp.isfinite(out[:, 330:400])))
