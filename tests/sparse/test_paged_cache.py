"""The paged cache against lists of tokens, in ragged steps, with NaN in every slot that holds none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import paged_cache
from effattn_jax.sparse.paged_cache import init_paged_cache, pages_since
from tests.compiled import jit
from tests.sparse.inputs import randn

PAGE, ROW_PAGES, CHUNK = 4, 5, 6
append, rewind, reset, gather = (jit(getattr(paged_cache, name)) for name in ("append", "rewind", "reset", "gather"))


def empty(batch=3, pages=12, row_pages=ROW_PAGES):
    cache = init_paged_cache(batch, pages, row_pages, 2, 3, 2, page_size=PAGE, dtype=jnp.float32)
    return cache._replace(k=jnp.full_like(cache.k, jnp.nan), v=jnp.full_like(cache.v, jnp.nan))


def tokens(seed, batch=3, length=CHUNK):
    return randn(seed, (batch, length, 2, 3), (batch, length, 2, 2))


def assert_holds(cache, rows):
    """`rows`: lists of (k, v)."""
    k, v = (np.asarray(x) for x in gather(cache))
    for b, row in enumerate(rows):
        assert cache.length[b] == len(row)
        for p in range(k.shape[1]):
            want = row[p] if p < len(row) else (np.zeros((2, 3)), np.zeros((2, 2)))
            np.testing.assert_array_equal(k[b, p], want[0])
            np.testing.assert_array_equal(v[b, p], want[1])
    used = np.asarray(cache.table)
    assert (used >= 0).sum(1).tolist() == [-(-len(row) // PAGE) for row in rows]
    used = used[used >= 0]
    assert len(set(used.tolist())) == len(used)  # no page is shared
    assert set(np.flatnonzero(~np.asarray(cache.free))) == set(used)


def assert_same(want, got):
    jax.tree.map(np.testing.assert_array_equal, want, got)


def test_is_a_list_of_tokens_for_each_row():
    cache, rows = empty(), [[], [], []]
    steps = [
        (append, [5, 0, 6]),
        (append, [1, 6, 3]),
        (rewind, [4, 5, 7]),
        (append, [6, 1, 0]),
        (reset, [True, False, False]),
        (append, [6, 6, 6]),
        (rewind, [6, 0, 13]),
        (append, [6, 6, 6]),
    ]
    for seed, (step, of_rows) in enumerate(steps):
        if step is append:
            k, v = tokens(seed)
            for b, count in enumerate(of_rows):
                rows[b] = rows[b] + [(k[b, i], v[b, i]) for i in range(count)]
                k[b, count:] = np.nan  # what a row does not take may hold anything
            cache = append(cache, k, v, np.array(of_rows))
        elif step is rewind:
            rows = [row[:length] for row, length in zip(rows, of_rows, strict=True)]
            cache = rewind(cache, np.array(of_rows))
        else:
            rows = [[] if gone else row for row, gone in zip(rows, of_rows, strict=True)]
            cache = reset(cache, np.array(of_rows))
        assert_holds(cache, rows)


@pytest.mark.slow
def test_steps_after_a_prompt_are_a_longer_prompt():
    k, v = tokens(0, 1, 18)
    whole = append(empty(1, 5), k, v)
    cache = empty(1, 5)
    for start in range(0, 18, CHUNK):  # 6, 6, then token by token
        if start < 12:
            cache = append(cache, k[:, start : start + CHUNK], v[:, start : start + CHUNK])
    for i in range(12, 18):
        chunk = [np.concatenate([x[:, i : i + 1]] * CHUNK, 1) for x in (k, v)]
        cache = append(cache, *chunk, np.array([1]))
    assert_same(whole, cache)


def test_rewind_after_append_is_the_cache_before():
    k, v = tokens(0)
    cache = append(empty(), k, v, np.array([3, 4, 6]))
    back = rewind(append(cache, *tokens(1), np.array([6, 2, 5])), np.array([3, 4, 6]))
    assert_same(cache[2:], back[2:])
    assert_same(gather(cache), gather(back))


def test_what_finds_no_page_is_lost_and_harms_no_other():
    k, v = tokens(0)
    cache = append(empty(pages=4), k, v)  # two pages each, for two rows only
    for got, want in zip(gather(cache), (k, v), strict=True):
        np.testing.assert_array_equal(got[:2, :CHUNK], want[:2])


def test_pages_since():
    cache = append(empty(), *tokens(0), np.array([6, 0, 4]))
    page, held = pages_since(cache, jnp.array([3, 0, 4]), CHUNK)
    assert held.tolist() == [[4, 2, 0], [0, 0, 0], [0, 0, 0]]
    table = np.asarray(cache.table)
    assert page.tolist() == [[*table[0, :2], 12], [12, 12, 12], [12, 12, 12]]
    assert pages_since(cache, jnp.array([5, 0, 3]), 1)[1].tolist() == [[2], [0], [4]]


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("k", lambda c, k, v: paged_cache.append(c, k[:, :, :1], v)),
        ("v", lambda c, k, v: paged_cache.append(c, k, v[:, :2])),
        ("counts", lambda c, k, v: paged_cache.append(c, k, v, np.array([1, 7, 1]))),
        ("k", lambda c, k, v: paged_cache.append(c._replace(length=c.length + 15), k, v)),  # rows of 21 tokens
        ("k", lambda c, k, v: paged_cache.append(c._replace(free=c.free.at[1:].set(False)), k, v)),
        ("lengths", lambda c, k, v: paged_cache.rewind(c, 1)),
        ("rows", lambda c, k, v: paged_cache.reset(c, np.array([True]))),
        ("page_size", lambda c, k, v: init_paged_cache(1, 1, 1, 1, 1, page_size=0)),
    ],
)
def test_bad_arguments(argument, call):
    with pytest.raises(ValueError, match=rf"\b{argument}: got .+; needs .+"):
        call(empty(), *tokens(0))
