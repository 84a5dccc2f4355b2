"""Any way to cut a sequence into calls gives what one call of attention gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import KVCache, cached_attention, init_cache
from tests.ratio import FLOAT32, assert_close, error_ratio
from tests.sparse.inputs import attend, attend_cached, documents, qkv, sink_logits

LENGTH, WINDOW = 48, 8
CHUNKS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW)


def cache_of(capacity, arrays, dtype=jnp.float32):
    batch, _, kv_heads, key_dim = arrays[1].shape
    return init_cache(batch, capacity, kv_heads, key_dim, arrays[2].shape[-1], dtype)


def in_chunks(arrays, cache, sizes, segment_ids=None, **options):
    """Outputs of calls with `sizes` tokens, and the cache after the last."""
    outputs, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        ids = None if segment_ids is None else segment_ids[:, part]
        out, cache = attend_cached(*(x[:, part] for x in arrays), cache, segment_ids=ids, **options)
        outputs.append(np.asarray(out))
        start += size
    return np.concatenate(outputs, axis=1), cache


def sizes_of(chunk):
    return [min(chunk, LENGTH - start) for start in range(0, LENGTH, chunk)]


RING, BUFFER = (WINDOW, WINDOW), (None, LENGTH + 3)


@pytest.mark.parametrize(
    ("window", "capacity", "chunk"),
    [(*kind, chunk) for kind in (RING, BUFFER) for chunk in CHUNKS] + [(WINDOW, WINDOW + 5, WINDOW + 1)],
)
@pytest.mark.quick_cases(1)
def test_chunks_are_one_pass(window, capacity, chunk):
    arrays, sinks = qkv(LENGTH, value_dim=12), sink_logits()
    want = attend(*arrays, window=window, sinks=sinks, logits_soft_cap=20.0)
    got, cache = in_chunks(
        arrays, cache_of(capacity, arrays), sizes_of(chunk), window=window, sinks=sinks, logits_soft_cap=20.0
    )
    assert_close(want, got, FLOAT32)
    assert int(cache.length) == LENGTH


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("window", [WINDOW, None])
def test_uneven_chunks_with_documents_and_padding(window):
    arrays, ids = qkv(LENGTH), documents(LENGTH)
    want = attend(*arrays, window=window, segment_ids=ids)
    sizes = (23, 1, 1, 23)
    got, cache = in_chunks(arrays, cache_of(LENGTH, arrays), sizes, ids, window=window)
    assert_close(want, got, FLOAT32)
    np.testing.assert_array_equal(cache.segment, ids.max(axis=1))
    assert np.all(np.asarray(cache.segment_ids)[ids < 0] == -1)


def test_new_tokens_continue_the_last_document():
    arrays = qkv(12)
    ids = np.array([[0] * 4 + [3] * 8, [-1] * 2 + [5] * 10])
    _, cache = in_chunks([x[:, :7] for x in arrays], cache_of(12, arrays), [7], ids[:, :7])
    got, _ = in_chunks([x[:, 7:] for x in arrays], cache, [1, 3, 1])
    assert_close(attend(*arrays, segment_ids=ids)[:, 7:], got, FLOAT32)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("window", [WINDOW, None])
def test_left_padding_does_not_matter(window):
    """A row without and a row with 9 tokens of padding that hold garbage; the next 10 tokens continue both."""
    arrays = qkv(40)
    ids = np.where(np.arange(30) >= np.array([[0], [9]]), 0, -1)
    spoiled = [x.copy() for x in arrays]
    for x in spoiled:
        x[1, :9] = np.nan
    prompt, cache = in_chunks([x[:, :30] for x in spoiled], cache_of(40, arrays), [30], ids, window=window)
    decoded, cache = in_chunks([x[:, 30:] for x in arrays], cache, [1] * 10, window=window)
    got = np.concatenate([prompt, decoded], axis=1)
    alone = [x[1:, 9:] for x in arrays]
    assert_close(attend(*alone, window=window), got[1:, 9:], FLOAT32)
    assert_close(attend(*arrays, window=window)[:1], got[:1], FLOAT32)
    assert np.all(got[1, :9] == 0)
    assert all(np.all(np.isfinite(x)) for x in cache[:2])


@pytest.mark.parametrize("window", [WINDOW, None])
@pytest.mark.quick_cases(1)
def test_implementations_agree(window):
    arrays = qkv(20, heads=6)
    run = lambda name: in_chunks(  # noqa: E731
        arrays, cache_of(20, arrays), (8, 1, 1, 8, 1, 1), window=window, implementation=name, scale=0.3
    )[0]
    assert_close(run("dense"), run("xla"), FLOAT32)


def test_bfloat16_cache_rounds_keys_and_values_once():
    arrays = qkv(LENGTH)
    rounded = [arrays[0], *(x.astype(jnp.bfloat16).astype(jnp.float32) for x in arrays[1:])]
    got, _ = in_chunks(arrays, cache_of(WINDOW, arrays, jnp.bfloat16), (24, 24), window=WINDOW)
    assert_close(attend(*rounded, window=WINDOW), got, 0.005)


def integers(x):
    """Whole multiples of max |x| / 127 of each vector, at most 127 of them."""
    step = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    return np.round(x / step) * step


@pytest.mark.parametrize("implementation", ["xla", "dense"])
@pytest.mark.parametrize("window", [WINDOW, None])
@pytest.mark.quick_cases(1)
def test_an_int8_cache_is_attention_over_integers(window, implementation):
    arrays, ids = qkv(LENGTH, value_dim=12), documents(LENGTH)
    cache, exact = cache_of(LENGTH, arrays, jnp.int8), cache_of(LENGTH, arrays)
    options = {"window": window, "logits_soft_cap": 20.0}
    rounded = [arrays[0], *map(integers, arrays[1:])]
    want = attend(*rounded, segment_ids=ids, **options)
    got, cache = in_chunks(arrays, cache, (23, 1, 1, 23), ids, **options, implementation=implementation)
    assert_close(want, got, FLOAT32)
    assert cache.k.dtype == cache.v.dtype == jnp.int8
    # against keys and values as they are: steps of 1/127 of the largest channel
    assert 1e-3 < error_ratio(attend(*arrays, segment_ids=ids, **options), got) < 0.01
    nbytes = lambda cache: sum(x.nbytes for x in (cache.k, cache.v, cache.k_scale, cache.v_scale) if x is not None)  # noqa: E731
    assert nbytes(exact) == 4 * (16 + 12) * 2 * LENGTH * 2
    assert nbytes(cache) == (16 + 4 + 12 + 4) * 2 * LENGTH * 2


def test_an_int8_cache_keeps_zeros():
    arrays = [x * 0 for x in qkv(4)]
    out, cache = in_chunks(arrays, cache_of(8, arrays, jnp.int8), (3, 1))
    assert np.all(out == 0)
    assert np.all(np.isfinite(cache.k_scale))


def test_layers_are_scanned():
    """Caches stacked along a leading axis of layers, carried by one scan per token."""
    arrays, layers = qkv(6), 3
    stacked = jax.tree.map(lambda x: jnp.stack([x] * layers), cache_of(WINDOW, arrays))

    def layer(x, cache):
        out, cache = cached_attention(x, *(y[:, : x.shape[1]] for y in arrays[1:]), cache, window=4)
        return out, cache

    @jax.jit
    def token(x, caches):
        return jax.lax.scan(layer, x, caches)

    out, caches = token(arrays[0][:, :2], stacked)
    assert isinstance(caches, KVCache)
    assert jax.tree.map(jnp.shape, caches) == jax.tree.map(jnp.shape, stacked)
    want = arrays[0][:, :2]
    for _ in range(layers):
        want = attend(want, *(y[:, :2] for y in arrays[1:]), window=4)
    assert_close(want, out, FLOAT32)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("window", [WINDOW, None])
def test_gradients_flow_through_a_chunk(window):
    """Backpropagation through the second chunk into the keys that the first one stored."""
    arrays = qkv(30)

    def cached(arrays):
        first, cache = cached_attention(*(x[:, :15] for x in arrays), cache_of(30, arrays), window=window)
        second, _ = cached_attention(*(x[:, 15:] for x in arrays), cache, window=window)
        return jnp.sum(first**2) + jnp.sum(second**2)

    want = jax.jit(jax.grad(lambda arrays: jnp.sum(attend(*arrays, window=window) ** 2)))(list(arrays))
    assert_close(want, jax.jit(jax.grad(cached))(list(arrays)), FLOAT32)


def test_cost_follows_the_filled_length():
    """Slots after the last query are not touched: not a number there would reach every row."""
    arrays = qkv(20)
    cache = cache_of(1024, arrays)
    cache = cache._replace(k=cache.k.at[:, 512:].set(jnp.nan), v=cache.v.at[:, 512:].set(jnp.nan))
    got, _ = in_chunks(arrays, cache, (8, 12))
    assert_close(attend(*arrays), got, FLOAT32)
