"""Caches of routed attention whose rows have lengths of their own: each row is what it would be alone."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention
from effattn_jax.sparse.dsa import dsa
from effattn_jax.sparse.dsa_cache import append_dsa, cached_dsa, init_dsa_cache, rewind_dsa
from effattn_jax.sparse.infllm2_cache import cached_infllm2, rewind_infllm2
from effattn_jax.sparse.moba_cache import append_moba, rewind_moba
from effattn_jax.sparse.nsa_cache import cached_nsa, rewind_nsa
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.records.dsa import indexer
from tests.sparse.test_routed_caches import CAPACITY, INFLLM2, NSA, STEPS, WHOLE, draw, gates, nsa_branches, phi
from tests.sparse.test_routed_caches import empty as empty_cache

DENSE_LEN = 20
COUNTS = ((4, 0), (3, 4), (4, 4), (0, 1), (1, 0), (1, 1), (4, 3), (2, 4), (1, 1), (4, 1), (4, 4), (1, 1), (1, 0))


def step_nsa(q, k, v, cache, new):
    return cached_nsa(q, *nsa_branches(k, v), gates(q), cache, phi_k=phi, phi_v=phi, new=new, **NSA)


def step_infllm2(q, k, v, cache, new, dense_len=-1):
    return cached_infllm2(q, k, v, cache, coarse_lse=True, new=new, **INFLLM2 | {"dense_len": dense_len})


def indexed_dsa(q, k, v, cache=None, new=None):
    index_q, index_k, weights = indexer(q, k)
    if cache is None:
        return dsa(q, k, v, index_q, index_k, weights, topk=7)
    return cached_dsa(q, k, v, index_q, index_k, weights, cache, topk=7, new=new)


def step_moba(q, k, v, cache, new):
    return STEPS["moba"](q, k, v, cache, new=new)


ROWS = {
    "moba": (step_moba, WHOLE["moba"]),
    "nsa": (jit(step_nsa), WHOLE["nsa"]),
    "infllm2": (jit(step_infllm2), WHOLE["infllm2"]),
    "infllm2_dense_at_first": (jit(partial(step_infllm2, dense_len=DENSE_LEN)), None),
    "dsa": (jit(indexed_dsa), jit(indexed_dsa)),
}
REWIND = {
    "moba": rewind_moba,
    "nsa": partial(rewind_nsa, kernel_size=4),
    "infllm2": rewind_infllm2,
    "infllm2_dense_at_first": rewind_infllm2,
    "dsa": rewind_dsa,
}


def empty(name):
    if name == "dsa":
        cache = init_dsa_cache(2, CAPACITY, 2, 8, 6, index_dim=5, dtype=jnp.float32)
    else:
        cache = empty_cache(name.removesuffix("_dense_at_first"))
    return cache._replace(length=jnp.zeros(2, jnp.int32))


def whole(name, qkv):
    if name != "infllm2_dense_at_first":
        return np.asarray(ROWS[name][1](*qkv))
    sparse, dense = WHOLE["infllm2"](*qkv), jit(attention)(*qkv)
    return np.where(np.arange(sparse.shape[1])[:, None, None] < DENSE_LEN - 1, dense, sparse)


def some(qkv, starts, counts, size):
    """The next tokens of each row, with what is no number behind them."""
    parts = []
    for x in qkv:
        part = np.full((2, size, *x.shape[2:]), np.nan, x.dtype)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            part[row, :count] = x[row, start : start + count]
        parts.append(part)
    return parts


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.startswith("infllm2") else []) for name in ROWS]
)
@pytest.mark.parametrize("rewinds", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_are_as_if_alone(name, rewinds):
    """In calls of four tokens and of one, some of them padding; a draft that one row takes back."""
    qkv, step, cache = draw(), ROWS[name][0], empty(name)
    want, starts = whole(name, qkv), np.zeros(2, int)
    for counts in COUNTS:
        size = 1 if max(counts) == 1 else 4
        if rewinds and min(starts) > 3:
            draft = some(draw(9), starts, (0, 1), 1)
            _, drafted = step(*draft, cache, jnp.int32([0, 1]))
            cache = REWIND[name](drafted, cache.length)
        out, cache = step(*some(qkv, starts, counts, size), cache, jnp.int32(counts))
        for row, count in enumerate(counts):
            assert_close(want[row, starts[row] : starts[row] + count], out[row, :count], FLOAT32)
            assert not np.any(out[row, count:])
        starts += counts
    np.testing.assert_array_equal(cache.length, starts)


def test_bad_rows():
    q, k, v = draw(length=2)
    cache = empty("moba")
    with pytest.raises(ValueError, match=r"cache.length: got shape \(\); needs .+ to count tokens of each row"):
        append_moba(cache._replace(length=np.int32(0)), k, v, block_size=8, new=np.int32([1, 2]))
    with pytest.raises(ValueError, match=r"new: got shape \(3,\); needs .+"):
        append_moba(cache, k, v, block_size=8, new=np.int32([1, 2, 2]))
    full = empty("dsa")._replace(length=np.int32([3, CAPACITY - 1]))
    _, index_k, _ = indexer(q, k)
    with pytest.raises(ValueError, match="k: got 2 tokens; needs at most 1, the free slots"):
        append_dsa(full, k, v, index_k, new=np.int32([2, 2]))
    with pytest.raises(ValueError, match=r"length: got \[3, 43\]; needs from \[0, 0\] to \[3, 42\] tokens"):
        rewind_dsa(full, np.int32([3, 43]))
