"""Caches of routed attention: any split of a row gives one pass, in outputs and in state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention
from effattn_jax.sparse.infllm2 import infllm2
from effattn_jax.sparse.infllm2_cache import append_infllm2, cached_infllm2, init_infllm2_cache, rewind_infllm2
from effattn_jax.sparse.moba import moba
from effattn_jax.sparse.moba_cache import append_moba, cached_moba, init_moba_cache, rewind_moba
from effattn_jax.sparse.nsa import KV, nsa
from effattn_jax.sparse.nsa_cache import cached_nsa, init_nsa_cache, rewind_nsa
from tests.compiled import jit
from tests.ratio import BFLOAT16_OUT, FLOAT32, assert_close
from tests.sparse.inputs import randn

LENGTH, CAPACITY, SPARE = 40, 43, 3
WINDOWS = {"kernel_size": 4, "kernel_stride": 2}
NSA = {**WINDOWS, "block_size": 8, "topk": 3, "local_blocks": 1, "window": 5}
INFLLM2 = {**WINDOWS, "block_size": 8, "topk": 3, "window": 8, "dense_len": -1}
MOBA = {"block_size": 8, "topk": 3}


def phi(x):
    return jnp.einsum("bwlgk,l->bwgk", x, jnp.array([0.5, -1, 0.7, 1], x.dtype))


def nsa_branches(k, v):
    """Keys and values that differ between branches."""
    return KV(k, v), KV(k[..., ::-1], -v), KV(-k, v[..., ::-1])


def gates(q):
    return jax.nn.sigmoid(q[..., :3])


def step_nsa(q, k, v, cache):
    return cached_nsa(q, *nsa_branches(k, v), gates(q), cache, phi_k=phi, phi_v=phi, **NSA)


def whole_nsa(q, k, v):
    return nsa(q, *nsa_branches(k, v), gates(q), phi_k=phi, phi_v=phi, **NSA)


STEPS = {
    "moba": jit(partial(cached_moba, **MOBA)),
    "infllm2": jit(partial(cached_infllm2, coarse_lse=True, **INFLLM2)),
    "nsa": jit(step_nsa),
}
WHOLE = {
    "moba": jit(partial(moba, **MOBA)),
    "infllm2": jit(partial(infllm2, coarse_lse=True, **INFLLM2)),
    "nsa": jit(whole_nsa),
}
OF_EACH = pytest.mark.parametrize("name", STEPS)
REWIND = {"moba": rewind_moba, "infllm2": rewind_infllm2, "nsa": partial(rewind_nsa, kernel_size=4)}


def empty(name):
    sizes = (2, CAPACITY, 2, 8, 6)
    if name == "moba":
        return init_moba_cache(*sizes, block_size=8, dtype=jnp.float32)
    if name == "nsa":
        return init_nsa_cache(*sizes, **WINDOWS, window=5, spare=SPARE, dtype=jnp.float32)
    return init_infllm2_cache(*sizes, **WINDOWS, dtype=jnp.float32)


def draw(seed=0, length=LENGTH):
    q, k, v = randn(seed, (2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 6))
    return 2 * q, k, v


def walk(name, qkv, sizes, cache=None):
    """Call after call."""
    cache, outs, start = empty(name) if cache is None else cache, [], 0
    for size in sizes:
        out, cache = STEPS[name](*(x[:, start : start + size] for x in qkv), cache)
        outs.append(np.asarray(out))
        start += size
    return np.concatenate(outs, 1), cache


@pytest.mark.quick_cases(1)
@OF_EACH
def test_any_split_is_one_pass(name):
    """Chunks of a stride and one more or less, and single tokens over every boundary."""
    qkv = draw()
    want = WHOLE[name](*qkv)
    out, state = walk(name, qkv, (9, *(1,) * 31))
    other, same = walk(name, qkv, (*(3,) * 12, *(1,) * 4))
    assert_close(want, out, FLOAT32)
    assert_close(want, other, FLOAT32)
    assert_close(state, same, 1e-6)
    assert state.length == LENGTH


@pytest.mark.slow
@OF_EACH
def test_what_is_taken_back_leaves_no_trace(name):
    """Tokens of a draft that cross a block, a window and the ring, then others in their place."""
    qkv, draft = draw(), draw(9)
    want, _ = walk(name, qkv, (9, *(3,) * 10, 1))
    _, cache = walk(name, qkv, (9, *(3,) * 2))
    for round in range(3):  # from 15, 18 and 21 tokens on
        start = 15 + 3 * round
        _, cache = walk(name, [x[:, start : start + 3] for x in draft], (1, 1, 1), cache)
        cache = REWIND[name](cache, start)
        out, cache = walk(name, [x[:, start : start + 3] for x in qkv], (3,) if round else (1, 1, 1), cache)
        assert_close(want[:, start : start + 3], out, FLOAT32)
    out, _ = walk(name, [x[:, 24:] for x in qkv], (3,) * 5 + (1,), cache)
    assert_close(want[:, 24:], out, FLOAT32)


@pytest.mark.quick_cases(1)
@OF_EACH
def test_slots_that_hold_no_token_may_hold_anything(name):
    qkv = draw()
    want, _ = walk(name, qkv, (9, *(1,) * 31))
    cache = empty(name)
    nothing = lambda x: jnp.full_like(x, jnp.nan)  # noqa: E731
    if name == "nsa":
        poisoned = cache._replace(selected=KV(*map(nothing, cache.selected)))
    else:
        poisoned = cache._replace(k=nothing(cache.k), v=nothing(cache.v))
    out, _ = walk(name, qkv, (9, *(1,) * 31), poisoned)
    np.testing.assert_array_equal(want, out)


def test_state_of_tokens_without_queries():
    _, k, v = draw()
    for name, append in (
        ("moba", partial(append_moba, block_size=8)),
        ("infllm2", partial(append_infllm2, **WINDOWS)),
    ):
        _, want = walk(name, draw(), (9, *(1,) * 31))
        cache = empty(name)
        append = jit(append)
        for part in np.split(np.arange(LENGTH), 2):
            cache = append(cache, k[:, part], v[:, part])
        assert_close(want, cache, 1e-6)


def test_means_are_those_of_the_row():
    _, k, _ = draw()
    _, cache = walk("moba", draw(), (9, *(1,) * 31))
    assert_close(k.reshape(2, 5, 8, 2, 8).mean(2), cache.means[:, :5], 1e-6)
    _, cache = walk("infllm2", draw(), (9, *(1,) * 31))
    want = np.stack([k[:, 2 * c : 2 * c + 4].mean(1) for c in range(19)], 1)
    assert_close(want, cache.means[:, :19], 1e-6)
    assert not np.asarray(cache.means)[:, 19:].any()
    want = np.stack([k[:, 8 * c : 8 * c + 16].mean(1) for c in range(4)], 1)
    assert_close(want, cache.coarse[:, :4], 1e-6)


@pytest.mark.slow
def test_dense_until_there_are_enough_tokens():
    """Every token reads as its total length says, and the switch loses nothing."""
    qkv = draw()
    step = jit(partial(cached_infllm2, **INFLLM2 | {"dense_len": 33}))
    cache, outs = empty("infllm2"), []
    for t in range(LENGTH):
        out, cache = step(*(x[:, t : t + 1] for x in qkv), cache)
        outs.append(np.asarray(out))
    out = np.concatenate(outs, 1)
    dense, sparse = jit(attention)(*qkv), jit(partial(infllm2, **INFLLM2))(*qkv)
    assert np.abs(dense[:, 32:] - sparse[:, 32:]).max() > 0.01
    assert_close(dense[:, :32], out[:, :32], FLOAT32)
    assert_close(sparse[:, 32:], out[:, 32:], FLOAT32)


@pytest.mark.slow
def test_bfloat16_cache():
    """What chooses blocks is kept in float32."""
    qkv = [x.astype(jnp.bfloat16) for x in draw()]
    cache = init_moba_cache(2, CAPACITY, 2, 8, 6, block_size=8)
    out, cache = STEPS["moba"](*qkv, cache)
    assert (cache.k.dtype, cache.means.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(WHOLE["moba"](*qkv), out, BFLOAT16_OUT)
    cache = init_nsa_cache(2, CAPACITY, 2, 8, 6, **WINDOWS, window=5)
    out, cache = STEPS["nsa"](*qkv, cache)
    assert (cache.selected.k.dtype, cache.compressed.k.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(WHOLE["nsa"](*qkv), out, BFLOAT16_OUT)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("name", ["moba", "infllm2", "nsa"])
def test_bad_arguments(name):
    step = {
        "moba": partial(cached_moba, **MOBA),
        "infllm2": partial(cached_infllm2, **INFLLM2),
        "nsa": step_nsa,
    }[name]
    cache = empty(name)
    with pytest.raises(ValueError, match="k: got 44 tokens; needs at most the cache's capacity of 43"):
        step(*draw(length=44), cache)
    with pytest.raises(ValueError, match="k: got 4 tokens; needs at most 3, the free slots"):
        step(*draw(length=4), cache._replace(length=np.int32(40)))
    with pytest.raises(ValueError, match=r"\w+: got shape .+; needs .+"):
        step(*(x[:1] for x in draw(length=4)), cache)
    with pytest.raises(ValueError, match="length: got 8; needs from"):
        REWIND[name](cache._replace(length=np.int32(7)), 8)
    if name == "nsa":
        with pytest.raises(ValueError, match="length: got 6; needs from 7 to 10 tokens"):
            REWIND[name](cache._replace(length=np.int32(10)), 6)


@pytest.mark.parametrize("init", [init_moba_cache, init_infllm2_cache, init_nsa_cache])
def test_a_cache_of_nothing(init):
    with pytest.raises(ValueError, match=r"capacity: got 0; needs .+"):
        init(1, 0, 2, 8)
