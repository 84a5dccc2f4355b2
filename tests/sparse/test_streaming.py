"""StreamingLLM and its cache against a simulation of it, token by token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention
from effattn_jax.sparse.streaming import cached_streaming_attention, init_streaming_cache, streaming_attention
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.golden_inputs import DIGITS, SCALE, waves
from tests.sparse.inputs import qkv
from tests.sparse.rotary import rotary
from tests.sparse.streaming_oracle import streaming

cached = jit(partial(cached_streaming_attention, rotate=rotary))
LAST = (0.413454, 0.062366, -0.298567, -0.612364)


def test_table():
    with jax.enable_x64(True):
        run = jit(partial(streaming_attention, rotate=rotary, start=2, recent=4, scale=SCALE))
        np.testing.assert_allclose(run(*waves())[0, 31, 0], LAST, rtol=0, atol=DIGITS)


def test_table_by_a_cache():
    step = jit(partial(cached_streaming_attention, rotate=rotary, scale=SCALE))
    with jax.enable_x64(True):
        q, k, v = waves()
        cache = init_streaming_cache(1, 1, 4, start=2, recent=4, dtype=jnp.float64)
        for i in range(32):
            out, cache = step(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1], cache)
        np.testing.assert_allclose(out[0, 0, 0], LAST, rtol=0, atol=DIGITS)
        for held, row in ((cache.first_k, k[:, :2]), (cache.first_v, v[:, :2]), (cache.k, k[:, 28:])):
            np.testing.assert_array_equal(row, held)  # 28 is a multiple of 4: the ring begins in its first slot


def decode(q, k, v, sizes, **cache):
    outs, at = [], 0
    state = init_streaming_cache(q.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=jnp.float32, **cache)
    for size in sizes:
        out, state = cached(*(x[:, at : at + size] for x in (q, k, v)), state)
        outs.append(out)
        at += size
    assert at == q.shape[1]
    return np.concatenate(outs, axis=1), state


SPLITS = {
    "one by one": [1] * 30,
    "a chunk first": [9] + [1] * 21,
    "chunks below and above the window": [2, 5, 5, 18],
    "all at once": [30],
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("split", SPLITS)
def test_any_split_is_as_token_by_token(split):
    """The cache, too: evicting n at once is evicting one n times."""
    q, k, v = qkv(30, key_dim=8, value_dim=5)
    want, held = streaming(*(x.astype(np.float64) for x in (q, k, v)), start=3, recent=5)
    out, state = decode(q, k, v, SPLITS[split], start=3, recent=5)
    assert_close(want, out, FLOAT32)
    assert held == [0, 1, 2, 25, 26, 27, 28, 29]
    assert int(state.length) == 30
    np.testing.assert_array_equal(k[:, :3], state.first_k)
    np.testing.assert_array_equal(k[:, 25:], state.k)  # 25 is a multiple of 5
    np.testing.assert_array_equal(v[:, 25:], state.v)


def test_without_first_tokens():
    q, k, v = qkv(12, key_dim=8)
    want, _ = streaming(*(x.astype(np.float64) for x in (q, k, v)), start=0, recent=4)
    assert_close(want, decode(q, k, v, [7, 5], start=0, recent=4)[0], FLOAT32)


@pytest.mark.slow
def test_the_first_tokens_may_be_more_than_the_recent():
    q, k, v = qkv(20, key_dim=8)
    want, _ = streaming(*(x.astype(np.float64) for x in (q, k, v)), start=7, recent=2)
    assert_close(want, decode(q, k, v, [3, 3, 14], start=7, recent=2)[0], FLOAT32)


def test_nothing_evicted_is_dense_attention():
    q, k, v = qkv(20, 33, key_dim=8)
    where = np.broadcast_to(np.arange(33), (2, 33))
    want = jit(lambda q, k, v: attention(rotary(q, where[:, 13:]), rotary(k, where), v))(q, k, v)
    got = jit(partial(streaming_attention, rotate=rotary, start=4, recent=29))(q, k, v)
    assert_close(want, got, FLOAT32)


def test_unused_slots_may_hold_anything():
    q, k, v = qkv(3, key_dim=8)
    empty = init_streaming_cache(2, 2, 8, 16, start=4, recent=5, dtype=jnp.float32)
    poisoned = empty._replace(
        **{name: jnp.full_like(x, jnp.nan) for name, x in empty._asdict().items() if name != "length"}
    )
    want, _ = cached(q, k, v, empty)
    np.testing.assert_array_equal(want, cached(q, k, v, poisoned)[0])


def test_defaults():
    cache = init_streaming_cache(1, 2, 8)
    assert cache.first_k.shape == (1, 4, 2, 8)
    assert cache.v.shape == (1, 512, 2, 8)
    assert cache.k.dtype == jnp.bfloat16


def test_no_tokens_change_nothing():
    q, k, v = qkv(0, key_dim=8)
    cache = init_streaming_cache(2, 2, 8, 16, start=1, recent=2)
    out, after = cached_streaming_attention(q, k, v, cache, rotate=rotary)
    assert out.shape == (2, 0, 4, 16)
    assert after is cache


@pytest.mark.slow
def test_memory_is_linear_in_length():
    def size(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        loss = lambda q, k, v: streaming_attention(q, k, v, rotate=rotary, recent=64).sum()  # noqa: E731
        compiled = jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert size(16384) < 5 * size(4096)


BAD = {
    "no recent tokens": ("recent", {"recent": 0}),
    "less than no first tokens": ("start", {"start": -1}),
    "fewer keys than queries": ("k", {"q": np.zeros((2, 9, 4, 16), np.float32)}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    argument, change = BAD[case]
    q, k, v = qkv(8)
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+"):
        streaming_attention(**{"q": q, "k": k, "v": v, "rotate": rotary} | change)


BAD_CACHES = {
    "of other rows": ("cache.first_k", init_streaming_cache(1, 2, 16)),
    "of other key channels": ("cache.first_k", init_streaming_cache(2, 2, 8, 16)),
    "of other value channels": ("cache.first_v", init_streaming_cache(2, 2, 16, 8)),
    "of other heads": ("cache.first_k", init_streaming_cache(2, 4, 16)),
}


@pytest.mark.parametrize("case", BAD_CACHES)
def test_bad_caches(case):
    argument, cache = BAD_CACHES[case]
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+"):
        cached_streaming_attention(*qkv(8), cache, rotate=rotary)
