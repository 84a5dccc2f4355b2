"""Fixed patterns as masks, and attention under any mask, against brute force."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention, patterns
from effattn_jax.sparse.block_lists import block_lists, runs
from effattn_jax.sparse.listed_masks import BlockList, Documents, GlobalQueries
from effattn_jax.sparse.masked_attention import masked_attention
from effattn_jax.sparse.masks import Causal, SameBlock, Sinks, Window
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.brute_force import brute_force
from tests.sparse.golden_inputs import DIGITS, SCALE, waves
from tests.sparse.inputs import documents, qkv, randn, sink_logits

GOLDEN = {
    "window": (lambda: patterns.sliding_window(5), (0.238839, -0.147148, -0.509904, -0.792157), 23.619345),
    "a shape": (lambda: patterns.a_shape(2, 4), (0.223842, -0.132922, -0.468701, -0.730482), 41.571064),
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("row", GOLDEN)
def test_table(row):
    make, last, total = GOLDEN[row]
    with jax.enable_x64(True):
        out, _ = jit(partial(masked_attention, mask=make(), scale=SCALE, query_block=8, block_size=8))(*waves())
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out[0, 31, 0], last, rtol=0, atol=DIGITS)
        np.testing.assert_allclose(out.sum(), total, rtol=0, atol=DIGITS)


def matrix(mask, size=40):
    positions = np.arange(size)
    return np.asarray(mask(positions[:, None], positions[None, :]))


def by_pairs(allowed, size=40):
    return np.array([[bool(allowed(p, j)) for j in range(size)] for p in range(size)])


PATTERNS = {
    "window": (patterns.sliding_window(7), lambda p, j: 0 <= p - j <= 6),
    "a shape": (patterns.a_shape(4, 9), lambda p, j: j <= p and (j <= 3 or p - j <= 8)),
    "tri shape": (patterns.tri_shape(40, 2, 3, 5), lambda p, j: j <= p and (j <= 1 or p - j <= 2 or p >= 35)),
    "tri shape of a short row": (patterns.tri_shape(3, 1, 1, 5), lambda p, j: j <= p and (j == 0 or p == j or p < 3)),
    "dilated": (patterns.dilated(3, 4), lambda p, j: p - j in (0, 4, 8)),
    "dilated, two-sided": (patterns.dilated(3, 4, True), lambda p, j: abs(p - j) in (0, 4, 8)),
    "strided": (patterns.strided(5), lambda p, j: j <= p and (p - j <= 4 or (p - j) % 5 == 0)),
    "fixed": (patterns.fixed(8, 3), lambda p, j: j <= p and (p // 8 == j // 8 or j % 8 in (5, 6, 7))),
    "fixed, next head": (patterns.fixed(8, 3, 1), lambda p, j: j <= p and (p // 8 == j // 8 or j % 8 in (2, 3, 4))),
    "fixed, first again": (patterns.fixed(8, 3, 2), lambda p, j: j <= p and (p // 8 == j // 8 or j % 8 in (5, 6, 7))),
    "longformer": (
        patterns.longformer(2, (0, 20)),
        lambda p, j: p - j in (-2, -1, 0, 1, 2) or j in (0, 20) or p in (0, 20),
    ),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_is_its_set(pattern):
    mask, allowed = PATTERNS[pattern]
    np.testing.assert_array_equal(by_pairs(allowed), matrix(mask))


@pytest.mark.parametrize("sets", [patterns.strided_sets(6), patterns.fixed_sets(6, 1), patterns.fixed_sets(6, 2, 1)])
def test_two_steps_reach_the_whole_past_or_its_summaries(sets):
    """Strided: the square covers the past. Fixed: it covers every block up to its last summary column."""
    first, second = (matrix(x).astype(int) for x in sets)
    reached = (first + second) @ (first + second) > 0
    full = by_pairs(lambda p, j: j <= p)
    assert not (reached & ~full).any()
    if isinstance(sets[0], Window):
        assert (reached == full).all()
    else:
        columns = [j for j in range(6) if second[39, j]]
        np.testing.assert_array_equal(
            by_pairs(lambda p, j: j <= p and (p // 6 == j // 6 or j % 6 <= columns[-1])), reached
        )


def test_bigbird_reads_as_many_blocks_as_it_says():
    masks = patterns.bigbird(21 * 4 - 1, heads=3, block=4, rand=3, seed=5)
    tables = [mask.table.entries for mask in masks]
    for table in tables:
        assert table.shape == (21, 21)
        np.testing.assert_array_equal(table.sum(1)[2:-2], 5 + 3)
        np.testing.assert_array_equal(table.sum(1)[[1, -2]], 4 + 3)
        assert table[[0, -1]].all()
        assert table[:, [0, -1]].all()
        assert all(table[i, i - 1 : i + 2].all() for i in range(1, 20))
        assert not table[1, 19]
        assert not table[19, 1]
        assert ((table[2:-2].astype(int) @ table) > 0).all()
    assert not np.array_equal(tables[0], tables[1])
    assert masks == patterns.bigbird(83, 3, 4, 3, 5)
    assert masks != patterns.bigbird(83, 3, 4, 3, 6)
    assert all(m.table.entries.sum(1)[4] == 5 for m in patterns.bigbird(83, 1, 4, rand=0))


SMALL = {"query_block": 8, "block_size": 16}


def with_gradients(mask, do, dl, **options):
    def loss(q, k, v, segment_ids=None):
        out, lse = masked_attention(q, k, v, mask, segment_ids=segment_ids, **SMALL | options)
        return (out * do).sum() + (jnp.where(jnp.isneginf(lse), 0, lse) * dl).sum(), (out, lse)

    return jit(jax.grad(loss, (0, 1, 2), has_aux=True))


def check(masks, q, k, v, allowed, segment_ids=None, **options):
    """Values and gradients; `allowed` [B, H, T, M]."""
    do, dl = randn(1, (*q.shape[:3], v.shape[-1]), q.shape[:3])
    arrays = (q, k, v) if segment_ids is None else (q, k, v, segment_ids)
    gradients, (out, lse) = with_gradients(masks, do, dl, **options)(*arrays)
    (want, want_lse), want_gradients = brute_force(allowed, q, k, v, do, dl, sinks=options.get("sinks"))
    np.testing.assert_array_equal(np.isneginf(want_lse), np.isneginf(lse))
    finite = ~np.isneginf(want_lse)
    assert not np.asarray(out)[~finite].any()
    assert_close((want, want_lse[finite], want_gradients), (out, np.asarray(lse)[finite], gradients), FLOAT32)


@pytest.mark.slow
def test_bigbird():
    """Heads of other whole tiles run at once, without the mask, and the rows that read all apart from the others."""
    masks = patterns.bigbird(126, heads=4, block=4, rand=1)
    q, k, v = qkv(126, key_dim=12, value_dim=9)
    allowed = np.stack([np.kron(m.table.entries, np.ones((4, 4), bool))[:126, :126] for m in masks])
    check(masks, q, k, v, np.broadcast_to(allowed, (2, 4, 126, 126)), block_size=4, query_block=4)
    assert not any(block_lists(m, 0, 126, 126, 4, 4).partial for m in masks)
    assert len(runs(block_lists(masks[0], 0, 126, 126, 4, 4).blocks[:, None])) == 3


@pytest.mark.slow
def test_heads_of_their_own_masks():
    """Uneven shares of the key heads, a head without keys for some rows, and sinks."""
    masks = [Window(5), Causal() & Sinks(3), Window(5), BlockList(np.eye(4, k=-1) > 0, 16, 16)]
    sets = [
        lambda p, j: 0 <= p - j < 5,
        lambda p, j: j <= p and j < 3,
        lambda p, j: 0 <= p - j < 5,
        lambda p, j: p // 16 == j // 16 + 1,
    ]
    allowed = np.stack([by_pairs(x, 50)[20:] for x in sets])
    q, k, v = qkv(30, 50)
    check(masks, q, k, v, np.broadcast_to(allowed, (2, 4, 30, 50)), sinks=sink_logits())


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "mask", [Window(9), Window(9) | (Sinks(2) & Causal()), SameBlock(16)], ids=["by distance", "by position", "whole"]
)
def test_documents(mask):
    """Ids that are not known at trace time, one-token documents, padding that holds NaN."""
    length = 61
    q, k, v = qkv(length)
    ids = documents(length)
    allowed = np.zeros((2, 1, length, length), bool)
    for b, row in enumerate(ids):
        for p, j in np.ndindex(length, length):
            if row[p] == row[j] >= 0:
                first = int(np.argmax(row == row[p]))
                allowed[b, 0, p, j] = matrix(mask, length)[p - first, j - first]
    poisoned = [np.where(ids[:, :, None, None] < 0, np.nan, x) for x in (q, k, v)]
    do, dl = randn(1, (*q.shape[:3], v.shape[-1]), q.shape[:3])
    gradients, (out, lse) = with_gradients(mask, do, dl)(*poisoned, ids)
    clean = [np.where(ids[:, :, None, None] < 0, 0, x) for x in (q, k, v)]
    (want, want_lse), want_gradients = brute_force(np.broadcast_to(allowed, (2, 4, length, length)), *clean, do, dl)
    finite = ~np.isneginf(want_lse)
    np.testing.assert_array_equal(finite, ~np.isneginf(lse))
    assert_close((want, want_lse[finite], want_gradients), (out, np.asarray(lse)[finite], gradients), FLOAT32)


def test_the_causal_mask_is_dense_attention():
    q, k, v = qkv(20, 33)
    options = {"scale": 0.3, "logits_soft_cap": 5.0}
    want = attention(q, k, v, return_lse=True, **options)
    assert_close(want, jit(partial(masked_attention, mask=Causal(), **SMALL, **options))(q, k, v), FLOAT32)


def test_reads_the_tiles_it_must():
    lists = block_lists(Window(129) | (Sinks(64) & Causal()), 64 * 100, 64 * 3, 64 * 103, 64, 64)
    np.testing.assert_array_equal([[0, 98, 99, 100], [0, 99, 100, 101], [0, 100, 101, 102]], lists.blocks)
    assert lists.partial
    lists = block_lists(GlobalQueries((5,)), 0, 30, 31, 10, 10)  # a query of block 0 reads all
    np.testing.assert_array_equal([[0, 1, 2, 3], [-1] * 4, [-1] * 4], lists.blocks)
    none = block_lists(Documents(np.full(31, -1)), 0, 30, 31, 10, 10)
    np.testing.assert_array_equal([[-1]] * 3, none.blocks)
    assert not none.partial


def test_lists_of_many_tiles_are_made_in_parts(monkeypatch):
    mask = patterns.strided(50)
    want = block_lists(mask, 17, 300, 317, 8, 4)
    monkeypatch.setattr("effattn_jax.sparse.block_lists.TILES", 200)
    np.testing.assert_array_equal(want.blocks, block_lists(mask, 17, 300, 317, 8, 4).blocks)


def test_lists_are_cut_where_some_are_long():
    masks = patterns.bigbird(64 * 64, heads=2)
    lists = np.stack([block_lists(m, 0, 4096, 4096, 64, 64).blocks for m in masks], axis=1)
    assert lists.shape == (64, 2, 64)
    pieces = runs(lists)
    assert [x.shape for x in pieces] == [(1, 2, 64), (62, 2, 8), (1, 2, 64)]
    np.testing.assert_array_equal(lists[1:-1, :, :8], pieces[1])
    assert (lists[1:-1, :, 8:] == -1).all()
    scattered = patterns.longformer(64, range(0, 4096, 256))
    lists = block_lists(scattered, 0, 4096, 4096, 64, 64).blocks[:, None]
    assert [x.shape for x in runs(lists)] == [lists.shape]


def test_vmap():
    q, k, v = qkv(12, batch=3)
    run = lambda q, k, v: masked_attention(q, k, v, patterns.a_shape(2, 3), **SMALL)[0]  # noqa: E731
    each = jit(jax.vmap(lambda *row: run(*(x[None] for x in row))[0]))
    assert_close(jit(run)(q, k, v), each(q, k, v), FLOAT32)


@pytest.mark.slow
def test_memory_is_linear_in_length():
    def size(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
        run = lambda q, k, v: masked_attention(q, k, v, patterns.a_shape(64, 128))[0].sum()  # noqa: E731
        compiled = jit(jax.grad(run, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert size(16384) < 5 * size(4096)


def test_no_queries():
    q, k, v = qkv(0, 5)
    out, lse = masked_attention(q, k, v, Causal())
    assert out.shape == (2, 0, 4, 16)
    assert lse.shape == (2, 0, 4)


BAD = {
    "too few masks": ("mask", {"mask": [Causal()] * 3}),
    "no masks": ("mask", {"mask": [1, 2, 3, 4]}),
    "no block size": ("block_size", {"block_size": 0}),
    "no query block": ("query_block", {"query_block": 0}),
    "fewer keys than queries": ("k", {"q": np.zeros((2, 9, 4, 16), np.float32)}),
    "documents of other rows": ("segment_ids", {"segment_ids": np.zeros((2, 7), np.int32)}),
    "sinks of other heads": ("sinks", {"sinks": np.zeros(3, np.float32)}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    argument, change = BAD[case]
    q, k, v = qkv(8)
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+"):
        masked_attention(**{"q": q, "k": k, "v": v, "mask": Causal()} | change)


BAD_PATTERNS = {
    "no window": ("window", lambda: patterns.dilated(0)),
    "more columns than a block has": ("c", lambda: patterns.fixed(4, 5)),
    "a window below none": ("window", lambda: patterns.longformer(-1)),
    "too short for random blocks": ("length", lambda: patterns.bigbird(7 * 64, 1)),
    "less than no random blocks": ("rand", lambda: patterns.bigbird(1024, 1, rand=-1)),
}


@pytest.mark.parametrize("case", BAD_PATTERNS)
def test_bad_patterns(case):
    argument, make = BAD_PATTERNS[case]
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+"):
        make()
