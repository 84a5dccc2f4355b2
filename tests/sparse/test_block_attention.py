"""Block lists against a brute-force mask in float64 numpy, values and gradients."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention, block_attention, marked, merge, with_sinks
from tests.compiled import jit
from tests.ratio import BFLOAT16_GRAD, BFLOAT16_OUT, FLOAT32, assert_close
from tests.sparse.brute_force import brute_force
from tests.sparse.inputs import documents, qkv, randn

STATIC = ("block_size", "query_block", "causal", "scale", "logits_soft_cap", "implementation")
both = pytest.mark.parametrize("how", ["xla", "dense"])
listed = jit(block_attention, static_argnames=STATIC)


@pytest.fixture(autouse=True)
def some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(marked, "LOGITS", 8000)


def lists(seed, length, keys, *, block_size, query_block=1, heads=2, entries=3, batch=2):
    """Blocks in any order, some twice, some of none, some behind the last."""
    rng = np.random.default_rng(seed)
    blocks = -(-keys // block_size)
    shape = (batch, -(-length // query_block), heads, entries)
    return rng.integers(-2, blocks + 2, shape).astype(np.int32)


def visible(indices, length, keys, heads, *, block_size, query_block=1, causal=True, ids=None, key_mask=None):
    """[B, H, T, M], one key at a time."""
    batch, _, per, _ = indices.shape
    mask = np.zeros((batch, heads, length, keys), bool)
    for b, h, i in np.ndindex(batch, heads, length):
        position, which = keys - length + i, h * per // heads
        start = 0 if ids is None else int(np.flatnonzero(ids[b] == ids[b, position])[0])
        for block in indices[b, i // query_block, which]:
            for j in range(start + block * block_size, start + (block + 1) * block_size) if block >= 0 else ():
                mask[b, h, i, j : j + 1] = not (causal and j > position)
        if ids is not None:
            mask[b, h, i] &= (ids[b] == ids[b, position]) & (ids[b, position] >= 0)
        if key_mask is not None:
            mask[b, h, i] &= key_mask[b, which]
    return mask


@partial(jit, static_argnames=STATIC)
def with_gradients(q, k, v, indices, do, dl, **options):
    def loss(q, k, v):
        out, lse = block_attention(q, k, v, indices, **options)
        return (out * do).sum() + (jnp.where(jnp.isneginf(lse), 0, lse) * dl).sum(), (out, lse)

    gradients, outputs = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return outputs, gradients


def finite(tree):
    return jax.tree.map(lambda x: np.where(np.isneginf(x), 0, x), tree)


CASES = {  # T, M, block size, query block, lists a row, other arguments
    "a list a group": (65, 65, 16, 1, 2, {}),
    "a list a head": (33, 33, 16, 1, 4, {}),
    "the last of the keys": (20, 75, 16, 1, 2, {}),
    "blocks of queries at the end": (30, 63, 16, 8, 2, {"logits_soft_cap": 3.0, "scale": 0.7}),
    "tokens": (37, 37, 1, 1, 2, {}),
    "one query": (1, 47, 16, 1, 2, {}),
    "both ways": (40, 40, 16, 1, 2, {"causal": False}),
    "blocks of queries": (50, 50, 16, 16, 4, {}),
    "one block of queries": (15, 15, 16, 16, 4, {}),
    "narrow blocks": (37, 41, 5, 1, 4, {}),
    "wide blocks": (70, 70, 64, 1, 2, {}),
}


@pytest.mark.parametrize("case", CASES)
@both
@pytest.mark.quick_cases(2)
def test_is_the_softmax_over_the_listed_blocks(case, how):
    length, keys, block_size, query_block, per, options = CASES[case]
    sizes = {"block_size": block_size, "query_block": query_block}
    q, k, v = qkv(length, keys, key_dim=12, value_dim=9)
    indices = lists(3, length, keys, heads=per, **sizes)
    key_mask = np.random.default_rng(5).random((2, per, keys)) < 0.9
    do, dl = randn(1, (2, length, 4, 9), (2, length, 4))
    mask = visible(indices, length, keys, 4, key_mask=key_mask, causal=options.get("causal", True), **sizes)
    want = brute_force(mask, q, k, v, do, dl, options.get("scale"), options.get("logits_soft_cap"))
    (out, lse), gradients = with_gradients(
        q, k, v, indices, do, dl, key_mask=key_mask, implementation=how, **sizes, **options
    )
    np.testing.assert_array_equal(np.isneginf(want[0][1]), np.isneginf(lse))
    finite = ~np.isneginf(want[0][1])
    assert not np.asarray(out)[~finite].any()
    assert_close((want[0][0], want[0][1][finite], want[1]), (out, np.asarray(lse)[finite], gradients), FLOAT32)


@both
@pytest.mark.parametrize("block_size", [3, 16])
@pytest.mark.quick_cases(1)
def test_documents_have_blocks_of_their_own(block_size, how):
    length = 61
    q, k, v = qkv(length)
    ids = documents(length)
    indices = lists(4, length, 40, block_size=block_size, entries=2)
    do, dl = randn(1, (2, length, 4, 16), (2, length, 4))
    want = brute_force(visible(indices, length, length, 4, block_size=block_size, ids=ids), q, k, v, do, dl)
    poisoned = [np.where(ids[:, :, None, None] < 0, np.nan, x) for x in (q, k, v)]
    (out, lse), gradients = with_gradients(
        *poisoned, indices, do, dl, block_size=block_size, segment_ids=ids, implementation=how
    )
    finite = ~np.isneginf(want[0][1])
    np.testing.assert_array_equal(finite, ~np.isneginf(lse))
    assert_close((want[0][0], want[0][1][finite], want[1]), (out, np.asarray(lse)[finite], gradients), FLOAT32)


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.quick_cases(1)
def test_a_list_is_a_set(block_size):
    q, k, v = qkv(48)
    indices = np.stack([np.random.default_rng(i).permutation(48 // block_size)[:3] for i in range(2 * 48 * 2)])
    indices = indices.reshape(2, 48, 2, 3).astype(np.int32)
    do, dl = randn(1, (2, 48, 4, 16), (2, 48, 4))
    other = np.concatenate([np.full_like(indices, -1), indices[..., ::-1], indices, np.full_like(indices, 99)], -1)
    want, got = (with_gradients(q, k, v, x, do, dl, block_size=block_size) for x in (indices, other))
    assert_close(finite(want), finite(got), 1e-6)


def test_all_blocks_are_dense_attention():
    q, k, v = qkv(70)
    indices = np.broadcast_to(np.arange(5, dtype=np.int32), (2, 70, 2, 5))
    assert_close(attention(q, k, v, return_lse=True), listed(q, k, v, indices, block_size=16), FLOAT32)


def test_rows_may_begin_at_other_positions():
    q, k, v = qkv(1, 50)
    indices = lists(6, 1, 50, block_size=8)
    got = listed(q, k, v, indices, block_size=8, offset=np.array([20, 49]))
    for row, position in enumerate((20, 49)):
        cut = [x[row : row + 1, : position + 1] for x in (k, v)]
        want = listed(q[row : row + 1], *cut, indices[row : row + 1], block_size=8)
        assert_close(want[0], got[0][row : row + 1], FLOAT32)


@both
def test_what_no_list_names_may_hold_anything(how):
    q, k, v = qkv(32, 64)
    indices = np.full((2, 32, 2, 2), 1, np.int32)
    do, dl = randn(1, (2, 32, 4, 16), (2, 32, 4))
    clean = with_gradients(q, k, v, indices, do, dl, block_size=16, implementation=how)
    k, v = (np.concatenate([x[:, :32], np.full_like(x[:, 32:], np.nan)], 1) for x in (k, v))
    poisoned = with_gradients(q, k, v, indices, do, dl, block_size=16, implementation=how)
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)


@pytest.mark.parametrize("far", [2, 2**16, 2**17 + 1, 2**31 - 1])
def test_an_index_beyond_the_row_names_no_block(far):
    """In int32 far * block_size is another block's first key, or negative."""
    keys, block_size = 2**16, 2**15
    k = np.zeros((1, keys, 1, 2), np.float32)
    k[0, block_size:, 0, 0] = 1  # the second block's keys
    lists_of = np.array([[[[far, 1]]]], np.int32)
    out, lse = listed(k[:, -1:], k, k, lists_of, block_size=block_size, scale=1.0)
    np.testing.assert_allclose(out[0, 0, 0], (1, 0), rtol=1e-6)
    np.testing.assert_allclose(lse[0, 0, 0], 1 + np.log(block_size), rtol=1e-6)


def test_lists_of_small_integers():
    """An int8 times block_size is no int8."""
    q, k, v = qkv(1, 320)
    wide = np.array([4, 1, -1], np.int32)[None, None, None].repeat(2, 0).repeat(2, 2)
    want, got = (listed(q, k, v, x, block_size=64) for x in (wide, wide.astype(np.int8)))
    jax.tree.map(np.testing.assert_array_equal, want, got)
    assert_close(brute_force(visible(wide, 1, 320, 4, block_size=64), q, k, v), got, FLOAT32)


def test_every_block_of_a_size_that_no_step_divides():
    """13 blocks of 48, the last of 5 keys, some in one step of the loop and the others in the next."""
    length, keys = 6, 12 * 48 + 5
    q, k, v = qkv(length, keys)
    indices = np.broadcast_to(np.arange(13, dtype=np.int32), (2, length, 2, 13))
    do, dl = randn(1, (2, length, 4, 16), (2, length, 4))
    want = brute_force(visible(indices, length, keys, 4, block_size=48), q, k, v, do, dl)
    assert_close(want, with_gradients(q, k, v, indices, do, dl, block_size=48), FLOAT32)


@pytest.mark.slow
def test_every_query_lists_one_block():
    """A router that has collapsed: one block meets all queries, the others none."""
    q, k, v = qkv(300)
    indices = np.zeros((2, 300, 2, 1), np.int32)
    do, dl = randn(1, (2, 300, 4, 16), (2, 300, 4))
    want = brute_force(visible(indices, 300, 300, 4, block_size=16), q, k, v, do, dl)
    runs = [with_gradients(q, k, v, indices, do, dl, block_size=16) for _ in range(2)]
    assert_close(want, runs[0], FLOAT32)
    jax.tree.map(np.testing.assert_array_equal, *runs)  # to the bit


@both
def test_bfloat16(how):
    q, k, v = qkv(64, dtype=jnp.bfloat16)
    indices = lists(3, 64, 64, block_size=16)
    do, dl = randn(1, (2, 64, 4, 16), (2, 64, 4))
    want = brute_force(visible(indices, 64, 64, 4, block_size=16), q, k, v, do, dl)
    (out, lse), gradients = with_gradients(q, k, v, indices, do, dl, block_size=16, implementation=how)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    assert_close(want[0][0], out, BFLOAT16_OUT)
    assert_close(want[1], gradients, BFLOAT16_GRAD)


@both
@pytest.mark.slow
def test_transformations(how):
    q, k, v = qkv(32)
    options = {"block_size": 16, "implementation": how}
    indices = lists(3, 32, 32, block_size=16)
    do, dl = randn(1, (2, 32, 4, 16), (2, 32, 4))
    want = with_gradients(q, k, v, indices, do, dl, **options)
    each = jax.vmap(lambda *x: with_gradients(*(y[None] for y in x), **options))(q, k, v, indices, do, dl)
    assert_close(finite(want), finite(jax.tree.map(lambda x: x[:, 0], each)), 1e-6)
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), ("rows",))
    spec = jax.sharding.PartitionSpec("rows")
    sharded = jax.shard_map(
        partial(with_gradients.__wrapped__, **options),
        mesh=mesh,
        in_specs=(spec,) * 6,
        out_specs=spec,
    )
    assert_close(finite(want), finite(jit(sharded)(q, k, v, indices, do, dl)), 1e-6)


@pytest.mark.slow
def test_memory_is_linear_in_length():
    def size(length):
        q, k, v = (jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32) for _ in range(3))
        indices = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.int32)
        do, dl = q, jax.ShapeDtypeStruct((1, length, 2), jnp.float32)
        compiled = with_gradients.lower(q, k, v, indices, do, dl, block_size=64).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert size(8192) < 5 * size(2048)


@pytest.mark.slow
def test_joined_parts_are_one_softmax():
    q, k, v = qkv(40)
    do, dl = randn(1, (2, 40, 4, 16), (2, 40, 4))
    halves = [np.full((2, 40, 2, 1), i, np.int32) for i in range(3)]  # the first rows have no keys in the last ones

    def joined(q, k, v):
        outs, lses = zip(*(block_attention(q, k, v, x, block_size=16) for x in halves), strict=True)
        out, lse = merge(outs, lses)
        return (out * do).sum() + (lse * dl).sum(), (out, lse)

    gradients, outputs = jit(jax.grad(joined, (0, 1, 2), has_aux=True))(q, k, v)
    want = with_gradients(q, k, v, np.concatenate(halves, -1), do, dl, block_size=16)
    assert_close(want, (outputs, gradients), FLOAT32)


def test_of_no_keys_nothing_is_joined():
    none = jnp.zeros((1, 2, 1, 3)), jnp.full((1, 2, 1), -jnp.inf)

    def total(out, lse):
        out, lse = merge([out, none[0]], [lse, none[1]])
        out, lse = with_sinks(out, lse, jnp.array([0.5]))
        return out.sum() + lse.sum()

    assert np.isneginf(merge(*([x, x] for x in none))[1]).all()
    for gradient in jax.grad(total, (0, 1))(*none):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("z", [-5.0, 0.0, 5.0, 30.0, 80.0])
@pytest.mark.quick_cases(1)
def test_sinks_after_the_softmax(z):
    q, k, v = qkv(20)
    sinks = jnp.full(4, z)
    want = attention(q, k, v, sinks=sinks, return_lse=True)
    assert_close(want, with_sinks(*attention(q, k, v, return_lse=True), sinks), FLOAT32)


def test_no_queries_and_no_keys():
    q, k, v = qkv(4)
    for length, keys in ((0, 4), (4, 0), (0, 0)):
        lists_of_none = np.zeros((2, length, 2, 1), np.int32)
        out, lse = block_attention(q[:, :length], k[:, :keys], v[:, :keys], lists_of_none, block_size=4, offset=0)
        assert out.shape == (2, length, 4, 16)
        assert not out.any()
        assert np.isneginf(lse).all()


BAD = {
    "lists of other rows": ("block_indices", {"block_indices": np.zeros((2, 7, 2, 1), np.int32)}),
    "lists of floats": ("block_indices", {"block_indices": np.zeros((2, 8, 2, 1), np.float32)}),
    "more heads than lists allow": ("block_indices", {"block_indices": np.zeros((2, 8, 3, 1), np.int32)}),
    "fewer lists than key heads": ("block_indices", {"block_indices": np.zeros((2, 8, 1, 1), np.int32)}),
    "no block size": ("block_size", {"block_size": 0}),
    "no query block": ("query_block", {"query_block": 0}),
    "a mask of other keys": ("key_mask", {"key_mask": np.ones((2, 2, 7), bool)}),
    "documents of blocks of queries": (
        "segment_ids",
        {"segment_ids": np.zeros((2, 8), np.int32), "offset": 3},
    ),
    "unknown implementation": ("implementation", {"implementation": "abacus"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    argument, change = BAD[case]
    q, k, v = qkv(8)
    arguments = {"block_indices": np.zeros((2, 8, 2, 1), np.int32), "block_size": 4} | change
    with pytest.raises(ValueError, match=rf"\b{argument}:? got .+; needs .+"):
        block_attention(q, k, v, **arguments)


@pytest.mark.parametrize(
    ("platform", "length", "group", "block_size", "count", "takes"),
    [
        ("gpu", 2048, 16, 64, 8, "dense"),
        ("gpu", 4096, 32, 64, 8, "dense"),  # 256 logits for each listed key
        ("gpu", 4097, 32, 64, 8, "xla"),
        ("gpu", 63, 1, 16, 1, "xla"),  # few lists
        ("cpu", 2048, 16, 64, 8, "xla"),
        ("tpu", 2048, 16, 64, 8, "xla"),
    ],
)
def test_what_none_takes(platform, length, group, block_size, count, takes, monkeypatch):
    module = sys.modules["effattn_jax.sparse.block_attention"]  # the package's attribute is the function
    called = []

    def refuse(name):
        def implementation(*_):
            called.append(name)
            raise NotImplementedError

        return implementation

    monkeypatch.setattr(module, "platform", lambda: platform)
    monkeypatch.setattr(module, "IMPLEMENTATIONS", {name: refuse(name) for name in ("xla", "dense")})
    q, k = jnp.zeros((1, length, group, 8)), jnp.zeros((1, length, 1, 8))
    with pytest.raises(ExceptionGroup):
        block_attention(q, k, k, jnp.zeros((1, length, 1, count), jnp.int32), block_size=block_size)
    assert called == [takes]
