"""H2O: golden numbers, and token by token against lists of kept tokens in float64 numpy."""

import jax
import numpy as np
import pytest

from effattn_jax.sparse import attention
from effattn_jax.sparse.h2o import h2o, h2o_prefill, heavy_and_recent
from effattn_jax.sparse.last_weights import column_sums
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.golden_inputs import SCALE, waves
from tests.sparse.inputs import qkv
from tests.sparse.records.h2o import HEAVY, RECENT, simulate

prefill = jit(h2o_prefill, static_argnames=("heavy", "recent"))
step = jit(h2o, static_argnames=("recent",))


def kept(cache):
    """[B G] of {token: score}."""
    result = []
    for b, g in np.ndindex(cache.k.shape[0], cache.k.shape[2]):
        position, score = np.asarray(cache.position)[b, :, g], np.asarray(cache.score)[b, :, g]
        result.append({int(p): s for p, s in zip(position, score, strict=True) if p >= 0})
    return result


def test_table():
    with jax.enable_x64(True):
        q, k, _ = waves()
        tokens = jit(lambda q, k: heavy_and_recent(column_sums(q, k, SCALE), 4, 4))(q, k)
    assert tokens[0, 0].tolist() == [0, 4, 5, 6, 28, 29, 30, 31]


@pytest.mark.parametrize("prompt", [3, 12])
def test_is_its_simulation(prompt):
    """A prompt that fills the cache, and one that does not; groups of two heads share what is kept."""
    q, k, v = qkv(20)
    want, states = simulate(q, k, v, prompt, HEAVY, RECENT)
    out, cache = prefill(*(x[:, :prompt] for x in (q, k, v)), heavy=HEAVY, recent=RECENT)
    outs = [out]
    for t in range(prompt - 1, 20):
        if t >= prompt:
            out, cache = step(*(x[:, t : t + 1] for x in (q, k, v)), cache, recent=RECENT)
            outs.append(out)
        for got, history in zip(kept(cache), states, strict=True):
            state = history[t - prompt + 1]
            assert sorted(got) == sorted(state)
            np.testing.assert_allclose([got[j] for j in state], list(state.values()), rtol=1e-5)
    assert cache.k.shape[1] == HEAVY + RECENT
    assert cache.length == 20
    assert_close(want, np.concatenate(outs, axis=1), FLOAT32)


def test_keys_are_those_of_their_positions():
    q, k, v = qkv(12)
    _, cache = prefill(q, k, v, heavy=HEAVY, recent=RECENT)
    position = np.asarray(cache.position)[..., None]
    np.testing.assert_array_equal(cache.k, np.take_along_axis(k, position, axis=1))
    np.testing.assert_array_equal(cache.v, np.take_along_axis(v, position, axis=1))


@pytest.mark.slow
def test_a_large_cache_is_dense():
    q, k, v = qkv(9)
    out, cache = prefill(*(x[:, :6] for x in (q, k, v)), heavy=6, recent=5)
    outs = [out]
    for t in range(6, 9):
        out, cache = step(*(x[:, t : t + 1] for x in (q, k, v)), cache, recent=5)
        outs.append(out)
    assert_close(attention(q, k, v), np.concatenate(outs, axis=1), FLOAT32)


def test_column_sums_in_chunks():
    q, k, _ = qkv(23)
    want, got = (jit(lambda q, k, size=size: column_sums(q, k, None, size))(q, k) for size in (64, 5))
    assert_close(want, got, FLOAT32)
    np.testing.assert_allclose(np.sum(got, -1), 23, rtol=1e-5)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("heavy", lambda q, k, v, c: h2o_prefill(q, k, v, heavy=0, recent=1)),
        ("recent", lambda q, k, v, c: h2o_prefill(q, k, v, heavy=1, recent=0)),
        ("k", lambda q, k, v, c: h2o_prefill(q[:, 1:], k, v, heavy=1, recent=1)),
        ("recent", lambda q, k, v, c: h2o(q[:, :1], k[:, :1], v[:, :1], c, recent=7)),
        ("q", lambda q, k, v, c: h2o(q, k, v, c, recent=2)),
    ],
)
def test_bad_arguments(argument, call):
    q, k, v = qkv(12)
    cache = prefill(q, k, v, heavy=HEAVY, recent=RECENT)[1]
    with pytest.raises(ValueError, match=rf"\b{argument}: got .+; needs .+"):
        call(q, k, v, cache)
