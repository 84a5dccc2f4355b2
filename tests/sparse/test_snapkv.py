"""SnapKV: golden numbers, the choice against an oracle, and decoding over what was kept."""

import jax
import numpy as np
import pytest

from effattn_jax.sparse import attention
from effattn_jax.sparse.last_weights import last_weights
from effattn_jax.sparse.snapkv import pooled, snapkv, snapkv_prefill, snapkv_tokens
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.brute_force import brute_force
from tests.sparse.golden_inputs import DIGITS, SCALE, waves
from tests.sparse.inputs import qkv
from tests.sparse.records.snapkv import kept

STATIC = ("window", "capacity", "kernel", "pool", "scale")
tokens_of, prefill = jit(snapkv_tokens, static_argnames=STATIC), jit(snapkv_prefill, static_argnames=("room", *STATIC))
step = jit(snapkv)


def test_table():
    with jax.enable_x64(True):
        q, k, _ = waves()
        tokens = tokens_of(q, k, window=4, capacity=12, scale=SCALE)
        score = jit(lambda q, k: pooled(last_weights(q, k, 4, SCALE).sum(2), 4, 5, "avg"))(q, k)
    assert tokens[0, 0].tolist() == [9, 10, 11, 12, 22, 23, 24, 25, 28, 29, 30, 31]
    np.testing.assert_allclose(score[0, 0, :3], (0.066363, 0.066922, 0.067764), rtol=0, atol=DIGITS)


@pytest.mark.parametrize(("pool", "kernel", "window"), [("avg", 5, 6), ("max", 3, 4), ("avg", 1, 1)])
@pytest.mark.quick_cases(2)
def test_keeps_what_the_last_queries_read(pool, kernel, window):
    q, k, _ = qkv(33)
    options = {"window": window, "capacity": 13, "kernel": kernel, "pool": pool}
    assert tokens_of(q, k, **options).tolist() == kept(*(x.astype(np.float64) for x in (q, k)), **options)


@pytest.mark.slow
def test_a_large_capacity_keeps_everything():
    q, k, v = qkv(12)
    for capacity in (12, 13):
        tokens = snapkv_tokens(q, k, window=4, capacity=capacity)
        np.testing.assert_array_equal(tokens, np.broadcast_to(np.arange(12), (2, 2, 12)))
    out, cache = prefill(q[:, :10], k[:, :10], v[:, :10], room=2, window=4, capacity=12)
    outs = [out]
    for t in (10, 11):
        out, cache = step(*(x[:, t : t + 1] for x in (q, k, v)), cache)
        outs.append(out)
    assert_close(attention(q, k, v), np.concatenate(outs, axis=1), FLOAT32)


def test_decoding_reads_what_was_kept_and_what_is_new():
    q, k, v = qkv(36)
    options = {"window": 6, "capacity": 13, "kernel": 5, "pool": "avg"}
    lists = kept(*(x[:, :33].astype(np.float64) for x in (q, k)), **options)
    mask = np.zeros((2, 4, 36, 36), bool)
    mask[:, :, :33] = np.tril(np.ones((33, 36), bool))
    for b, h, t in np.ndindex(2, 4, 36):
        if t >= 33:
            mask[b, h, t, [*lists[b][h // 2], *range(33, t + 1)]] = True
    out, cache = prefill(*(x[:, :33] for x in (q, k, v)), room=3, **options)
    outs = [out]
    for t in range(33, 36):
        out, cache = step(*(x[:, t : t + 1] for x in (q, k, v)), cache)
        outs.append(out)
    assert_close(brute_force(mask, q, k, v)[0], np.concatenate(outs, axis=1), FLOAT32)
    assert np.asarray(cache.position)[0, :, 1].tolist() == [*lists[0][1], 33, 34, 35]
    assert (cache.used, cache.length) == (16, 36)
    with pytest.raises(ValueError, match="k: got 1 tokens; needs"):
        snapkv(*(x[:, :1] for x in (q, k, v)), cache)


def test_a_planted_token_survives():
    q, k, _ = qkv(33)
    q[:, -6:] = q[:, -1:]
    for place in (0, 11, 26):
        planted = k.copy()
        planted[:, place] = 3 * q[:, -1, ::2]
        tokens = np.asarray(tokens_of(q, planted, window=6, capacity=13, kernel=5, pool="avg"))
        assert (tokens == place).any(-1).all()


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("kernel", {"kernel": 4}),
        ("window", {"window": 0}),
        ("capacity", {"window": 8, "capacity": 8}),
        ("pool", {"pool": "mean"}),
        ("room", {"room": 0}),
        ("scale", {"scale": float("nan")}),
    ],
)
def test_bad_arguments(argument, options):
    with pytest.raises(ValueError, match=rf"\b{argument}: got .+; needs .+"):
        snapkv_prefill(*qkv(12), **{"room": 1} | options)
