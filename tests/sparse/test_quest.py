"""Quest: golden numbers, the bounds of pages, and one query over ragged rows against an oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse.paged_cache import gather, init_paged_cache, reset
from effattn_jax.sparse.quest import append_quest, init_quest, page_bounds, quest, quest_pages, rewind_quest
from tests.compiled import jit
from tests.ratio import BFLOAT16_OUT, FLOAT32, assert_close
from tests.sparse.brute_force import brute_force
from tests.sparse.golden_inputs import DIGITS, SCALE, waves
from tests.sparse.inputs import randn
from tests.sparse.records.quest import PAGE, chosen

LENGTHS = np.array([19, 5, 0, 16])
extend, back, pages_of = jit(append_quest), jit(rewind_quest), jit(page_bounds)
read = jit(quest, static_argnames=("budget", "force_last", "scale"))
choose = jit(quest_pages, static_argnames=("budget", "force_last"))


def empty(batch=4, pages=24, page=PAGE, dtype=jnp.float32, value_dim=6):
    cache = init_paged_cache(batch, pages, 6, 2, 8, value_dim, page_size=page, dtype=dtype)
    poison = lambda x: jnp.full_like(x, jnp.nan)  # noqa: E731
    cache = cache._replace(k=poison(cache.k), v=poison(cache.v))
    return cache, jax.tree.map(poison, init_quest(cache))


def filled(lengths=LENGTHS, seed=0, dtype=jnp.float32, value_dim=6):
    q, k, v = randn(seed, (4, 1, 4, 8), (4, 20, 2, 8), (4, 20, 2, value_dim), dtype=dtype)
    return q + q, k, v, *extend(*empty(dtype=dtype, value_dim=value_dim), k, v, lengths)


def mask_of(q, k, budget, lengths=LENGTHS):
    mask = np.zeros((4, 4, 1, k.shape[1]), bool)
    for b, length in enumerate(lengths):
        for h, pages in chosen(q[b, 0], k[b], length, budget).items() if length else ():
            for n in pages:
                mask[b, h, 0, n * PAGE : min((n + 1) * PAGE, length)] = True
    return mask


def test_table():
    with jax.enable_x64(True):
        q, k, v = waves()
        cache = init_paged_cache(1, 8, 8, 1, 4, page_size=4, dtype=jnp.float64)
        cache, bounds = extend(cache, init_quest(cache), k, v)
        score = pages_of(q[:, 31:], cache, bounds)
        options = {"budget": 12, "force_last": False}
        pages = choose(q[:, 31:], cache, bounds, **options)
        out = read(q[:, 31:], cache, bounds, scale=SCALE, **options)
    want = (-0.5105, 5.9409, 6.9202, 0.2042, 4.8686, 7.4649, 1.1904, 3.6716)
    np.testing.assert_allclose(score[0, 0], want, rtol=0, atol=6e-5)
    assert pages[0, 0].tolist() == [1, 2, 5]
    np.testing.assert_allclose(out[0, 0, 0], (0.365019, 0.353653, 0.286453, 0.174028), rtol=0, atol=DIGITS)


@pytest.mark.parametrize("budget", [4, 12])
@pytest.mark.quick_cases(1)
def test_is_the_softmax_over_the_chosen_pages(budget):
    """A row of no token returns 0, and no NaN of an unused slot reaches any."""
    q, k, v, cache, bounds = filled()
    want = brute_force(mask_of(q, k, budget), q, k, v)[0]
    out = read(q, cache, bounds, budget=budget)
    assert_close(want, out, FLOAT32)
    assert not np.asarray(out)[2].any()


def test_a_large_budget_is_dense():
    q, k, v, cache, bounds = filled()
    mask = np.broadcast_to(np.arange(20) < LENGTHS[:, None, None, None], (4, 4, 1, 20))
    assert_close(brute_force(mask, q, k, v)[0], read(q, cache, bounds, budget=20), FLOAT32)
    np.testing.assert_array_equal(read(q, cache, bounds, budget=24), read(q, cache, bounds, budget=400))  # to the bit


def test_pages_that_no_power_of_two_divides():
    """Pages of 48: the last tokens of full and of begun pages are read."""
    lengths, page = np.array([48, 96, 100, 47]), 48
    q, k, v = randn(0, (4, 1, 4, 8), (4, 100, 2, 8), (4, 100, 2, 6))
    cache, bounds = extend(*empty(pages=12, page=page), k, v, lengths)
    assert_bounds(cache, bounds)
    mask = np.broadcast_to(np.arange(100) < lengths[:, None, None, None], (4, 4, 1, 100))
    assert_close(brute_force(mask, q, k, v)[0], read(q, cache, bounds, budget=3 * page), FLOAT32)


def test_lists():
    q, k, _, cache, bounds = filled()
    for force_last in (True, False):
        lists = np.asarray(choose(q, cache, bounds, budget=8, force_last=force_last))
        for b in (0, 1, 3):
            for h, pages in chosen(q[b, 0], k[b], LENGTHS[b], 8, force_last).items():
                assert lists[b, h].tolist() == sorted(pages)
        assert (lists[2] == -1).all()


def test_the_budget_is_in_tokens():
    """Values that are one-hot, q = 0: the pages of the highest bounds, all equal, are the first ones and the last."""
    _, k, _, _, _ = filled()
    v = np.broadcast_to(np.eye(20, dtype=np.float32)[None, :, None], (4, 20, 2, 20))
    cache, bounds = extend(*empty(value_dim=20), k, v, LENGTHS)
    out = np.asarray(read(np.zeros((4, 1, 4, 8), np.float32), cache, bounds, budget=12))
    weights = out[0, 0, 0]
    assert np.flatnonzero(weights).tolist() == [*range(8), 16, 17, 18]
    np.testing.assert_allclose(weights[weights > 0], 1 / 11, rtol=1e-6)


def test_reads_nothing_but_the_chosen_pages():
    q, _, _, cache, bounds = filled()
    lists = np.asarray(choose(q, cache, bounds, budget=8))
    want = np.asarray(read(q, cache, bounds, budget=8))
    table = np.asarray(cache.table)
    unread = [n for n in range(5) if n not in lists[0, :2]]  # of the heads that share the first key head
    assert unread
    pages = table[0, unread]
    poisoned = cache._replace(k=cache.k.at[pages, :, 0].set(jnp.nan), v=cache.v.at[pages, :, 0].set(jnp.nan))
    np.testing.assert_array_equal(want, read(q, poisoned, bounds, budget=8))


def assert_bounds(cache, bounds):
    """Of all pages in use, from their tokens."""
    k = np.asarray(gather(cache)[0])
    for b, length in enumerate(np.asarray(cache.length)):
        for n in range(-(-length // cache.k.shape[1])):
            size = cache.k.shape[1]
            page, keys = cache.table[b, n], k[b, n * size : min((n + 1) * size, length)]
            np.testing.assert_array_equal(bounds.low[page], keys.min(0))
            np.testing.assert_array_equal(bounds.high[page], keys.max(0))


def test_bounds_follow_appends_rewinds_and_resets():
    """A speculative token of huge keys is taken back with its bounds."""
    _, k, v, cache, bounds = filled()
    assert_bounds(cache, bounds)
    more = [x * 100 for x in (k, v)]
    longer = extend(cache, bounds, *more, np.array([5, 2, 7, 4]))
    assert_bounds(*longer)
    shorter = back(*longer, LENGTHS)
    assert_bounds(*shorter)
    for page in np.asarray(cache.table)[np.asarray(cache.table) >= 0]:
        np.testing.assert_array_equal(bounds.low[page], shorter[1].low[page])
        np.testing.assert_array_equal(bounds.high[page], shorter[1].high[page])
    cleared = reset(longer[0], np.array([True, False, False, True]))
    assert_bounds(*extend(cleared, longer[1], k, v, np.array([3, 0, 2, 20])))


def test_bounds_are_above_every_product():
    q, k, _, cache, bounds = filled()
    score = np.asarray(pages_of(q, cache, bounds))
    for b, h in np.ndindex(4, 4):
        for j in range(LENGTHS[b]):
            product = q[b, 0, h].astype(np.float64) @ k[b, j, h // 2]
            assert score[b, h, j // PAGE] >= product - 1e-5


def test_a_page_of_one_token_has_its_product():
    q, k, v = randn(0, (4, 1, 4, 8), (4, 6, 2, 8), (4, 6, 2, 6))
    cache, bounds = extend(*empty(page=1), k, v)
    want = np.einsum("bhk,bmhk->bhm", q[:, 0], np.repeat(k, 2, axis=2))
    assert_close(want, pages_of(q, cache, bounds), FLOAT32)


def test_finds_a_planted_key_always():
    for seed in range(8):
        q, k, v = randn(seed, (4, 1, 4, 8), (4, 20, 2, 8), (4, 20, 2, 6))
        q[:, :, 1::2] = q[:, :, ::2]
        place = np.random.default_rng(seed).integers(0, 16, 4)
        k = k / 3
        k[np.arange(4), place] = 10 * q[:, 0, ::2] / np.linalg.norm(q[:, 0, ::2], axis=-1, keepdims=True)
        cache, bounds = extend(*empty(), k, v, np.full(4, 20))
        lists = np.asarray(choose(q, cache, bounds, budget=8))
        assert (lists == (place // PAGE)[:, None, None]).any(-1).all()


def test_bfloat16():
    q, k, v, cache, bounds = filled(dtype=jnp.bfloat16)
    want = brute_force(mask_of(*(np.asarray(x, np.float64) for x in (q, k)), 8), q, k, v)[0]
    out = read(q, cache, bounds, budget=8)
    assert out.dtype == jnp.bfloat16
    assert_close(want, out, BFLOAT16_OUT)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("budget", partial(quest, budget=6)),
        ("budget", partial(quest, budget=0)),
        ("scale", partial(quest, budget=4, scale=float("inf"))),
        ("q", lambda q, cache, bounds: quest(q[:, :, :, :4], cache, bounds, budget=4)),
        ("cache.k", lambda q, cache, bounds: quest(q[:, :, :3], cache, bounds, budget=4)),
    ],
)
def test_bad_arguments(argument, call):
    q, _, _, cache, bounds = filled()
    with pytest.raises(ValueError, match=rf"{argument}: got .+; needs .+"):
        call(q, cache, bounds)
