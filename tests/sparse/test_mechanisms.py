"""What every sparse mechanism must do, whatever it selects. Quick are the tests that share its two programs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention
from tests.compiled import jit
from tests.ratio import BFLOAT16_OUT, assert_close
from tests.sparse.brute_force import brute_force
from tests.sparse.inputs import randn
from tests.sparse.records import MECHANISMS


def of_each(wanted=lambda mechanism: True):
    chosen = [
        pytest.param(
            m,
            id=m.name,
            marks=[pytest.mark.xdist_group(f"sparse {m.name}"), *([pytest.mark.slow] if m.slow else [])],
        )
        for m in MECHANISMS
        if wanted(m)
    ]
    return pytest.mark.parametrize("mechanism", chosen)


def has_oracle(mechanism):
    return mechanism.mask is not None or mechanism.oracle is not None


def draw(m, length, keys=None, seed=0, batch=2, dtype=jnp.float32):
    keys = length if keys is None else keys
    shapes = (batch, length, m.heads, m.key_dim), (batch, keys, m.kv_heads, m.key_dim)
    q, k, v = randn(seed, *shapes, (batch, keys, m.kv_heads, m.value_dim), dtype=dtype)
    return q + q, k, v


def expected(m, q, k, v):
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    return m.oracle(q, k, v) if m.mask is None else brute_force(m.mask(q, k), q, k, v)[0]


def with_gradients(run, do):
    def loss(q, k, v):
        out = run(q, k, v)
        return (out * do).sum(), out

    return jit(jax.grad(loss, (0, 1, 2), has_aux=True))


@of_each(has_oracle)
def test_is_its_oracle(mechanism):
    _is_its_oracle(mechanism, max(mechanism.lengths))


@pytest.mark.slow
@of_each(has_oracle)
def test_is_its_oracle_at_every_length(mechanism):
    """G4."""
    for length in mechanism.lengths:
        _is_its_oracle(mechanism, length)


def _is_its_oracle(mechanism, length):
    q, k, v = draw(mechanism, length, seed=length)
    assert_close(expected(mechanism, q, k, v), jit(mechanism.run)(q, k, v), mechanism.limit, f"length {length}")


@pytest.mark.quick_cases(4)
@of_each(lambda m: m.trainable and m.mask is not None)
def test_gradients_are_those_of_the_softmax_under_its_mask(mechanism):
    """What is selected has no gradient of its own."""
    q, k, v = draw(mechanism, max(mechanism.lengths))
    (do,) = randn(1, (*q.shape[:3], v.shape[-1]))
    mask = mechanism.mask(*(np.asarray(x, np.float64) for x in (q, k)))
    (out, _), gradients = brute_force(mask, q, k, v, do)
    got, got_out = with_gradients(mechanism.run, do)(q, k, v)
    assert_close((out, gradients), (got_out, got), mechanism.limit)


@pytest.mark.slow
@of_each(lambda m: m.trainable and m.mask is None)
def test_gradients_are_differences_of_values(mechanism):
    with jax.enable_x64(True):
        q, k, v = (x.astype(np.float64) for x in draw(mechanism, max(mechanism.lengths)))
        do, dq, dk, dv = (
            x.astype(np.float64) for x in randn(1, (*q.shape[:3], v.shape[-1]), q.shape, k.shape, v.shape)
        )
        gradients, _ = with_gradients(mechanism.run, do)(q, k, v)
        step = 1e-6
        ends = [(jit(mechanism.run)(q + s * dq, k + s * dk, v + s * dv) * do).sum() for s in (step, -step)]
        got = sum(jnp.vdot(g, d) for g, d in zip(gradients, (dq, dk, dv), strict=True))
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), got, rtol=1e-6)


@pytest.mark.slow
@of_each(lambda m: m.dense is not None)
def test_reads_everything_within_a_large_budget(mechanism):
    """G1."""
    q, k, v = draw(mechanism, max(mechanism.lengths))
    want = attention(q, k, v)
    assert_close(want, jit(mechanism.dense)(q, k, v), 1e-5)


@of_each(lambda m: m.causal)
def test_no_row_depends_on_later_tokens(mechanism):
    """G3."""
    length = max(mechanism.lengths)
    run, (q, k, v) = jit(mechanism.run), draw(mechanism, length)
    other = draw(mechanism, length, seed=9)
    want = run(q, k, v)
    for cut in sorted({1, length // 2, length - 1} - {0, length}):
        mixed = [np.concatenate([x[:, :cut], y[:, cut:]], 1) for x, y in zip((q, k, v), other, strict=True)]
        np.testing.assert_array_equal(want[:, :cut], run(*mixed)[:, :cut])


@of_each(lambda m: not m.causal)
def test_selection_looks_ahead_by_design(mechanism):
    """What `causal=False` says of a mechanism is so: otherwise it belongs under the test above."""
    length = max(mechanism.lengths)
    run, (q, k, v) = jit(mechanism.run), draw(mechanism, length)
    other = draw(mechanism, length, seed=9)
    cut = length - 1
    mixed = [np.concatenate([x[:, :cut], y[:, cut:]], 1) for x, y in zip((q, k, v), other, strict=True)]
    assert not np.array_equal(run(q, k, v)[:, :cut], run(*mixed)[:, :cut])


@pytest.mark.slow
@of_each(lambda m: m.continues)
def test_the_last_queries_alone_are_the_last_rows(mechanism):
    """G6 without a cache."""
    length = max(mechanism.lengths)
    q, k, v = draw(mechanism, length)
    run = jit(mechanism.run)
    want = run(q, k, v)
    for last in (1, length // 2):
        assert_close(want[:, -last:], run(q[:, -last:], k, v), mechanism.limit)


@pytest.mark.slow
@of_each(lambda m: m.causal and m.continues)
def test_a_query_alone_is_its_row(mechanism):
    """G5 without a cache: a token with its past, at lengths around the sizes of blocks."""
    q, k, v = draw(mechanism, max(mechanism.lengths))
    run = jit(mechanism.run)
    want = run(q, k, v)
    for end in mechanism.lengths:
        own = slice(end - 1, end)
        assert_close(want[:, own], run(q[:, own], k[:, :end], v[:, :end]), mechanism.limit, f"length {end}")


@of_each(lambda m: m.decode is not None)
@pytest.mark.quick_cases(1)
def test_token_by_token_is_one_pass(mechanism):
    """G5, through its cache."""
    q, k, v = draw(mechanism, max(mechanism.lengths))
    assert_close(jit(mechanism.run)(q, k, v), jit(mechanism.decode)(q, k, v), mechanism.limit)


@pytest.mark.slow
@of_each(lambda m: m.shared)
def test_repeated_key_heads_change_nothing(mechanism):
    """G7: the same keys for each query head of its own, and their gradients added up."""
    q, k, v = draw(mechanism, max(mechanism.lengths))
    if mechanism.kv_heads == 1:
        pytest.fail("a record with one key head says nothing of groups")
    group = mechanism.heads // mechanism.kv_heads
    one = q[:, :, ::group]
    q = np.repeat(one, group, axis=2)  # alike in a group, so that a selection of a head is that of its group
    want = jit(mechanism.run)(q, k, v)
    repeated = [np.repeat(x, group, axis=2) for x in (k, v)]
    assert_close(want, jit(mechanism.run)(q, *repeated), mechanism.limit)


@pytest.mark.slow
@of_each(lambda m: m.packed)
def test_packed_documents_are_rows_of_their_own(mechanism):
    """G10, with documents shorter than a block, and padding that holds NaN."""
    lengths = (3, 1, max(mechanism.lengths), 8)
    total = sum(lengths) + 2
    q, k, v = draw(mechanism, total, batch=1)
    ids = np.repeat([0, 1, 2, 4, -1], [*lengths, 2])[None].astype(np.int32)
    (do,) = randn(1, (*q.shape[:3], v.shape[-1]))
    poisoned = [np.where(ids[:, :, None, None] < 0, np.nan, x) for x in (q, k, v)]
    run = lambda q, k, v: mechanism.run(q, k, v, segment_ids=ids)  # noqa: E731
    compute = (lambda run, do: with_gradients(run, do)) if mechanism.trainable else (lambda run, _: _values(run))
    gradients, out = compute(run, do)(*poisoned)
    parts = np.cumsum([0, *lengths])
    rows = []
    for start, end in itertools.pairwise(parts):
        of_row = compute(mechanism.run, do[:, start:end])
        rows.append(of_row(*(x[:, start:end] for x in (q, k, v))))
    want = jax.tree.map(lambda *x: np.concatenate([*x, np.zeros_like(x[0], shape=(1, 2, *x[0].shape[2:]))], 1), *rows)
    assert_close(want, (gradients, out), mechanism.limit)


def _values(run):
    return jit(lambda q, k, v: ((), run(q, k, v)))


@pytest.mark.slow
@of_each(lambda m: m.count is not None)
def test_reads_as_many_keys_as_it_says(mechanism):
    """G14 by value coding: values that are one-hot make the output the row of weights, uniform where q = 0."""
    for length in mechanism.lengths:
        q, k, _ = draw(mechanism, length)
        v = np.broadcast_to(np.eye(length, dtype=np.float32)[None, :, None], (2, length, mechanism.kv_heads, length))
        weights = np.asarray(jit(mechanism.run)(q, k, v))[:, -1]
        np.testing.assert_array_equal((weights > 0).sum(-1), mechanism.count(length))
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


@pytest.mark.slow
@of_each()
def test_half_precision(mechanism):
    """G13: the selection is made in float32 and is the same every time."""
    q, k, v = draw(mechanism, max(mechanism.lengths), dtype=jnp.bfloat16)
    run = jit(mechanism.run)
    out = run(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, run(q, k, v))
    if has_oracle(mechanism):
        assert_close(expected(mechanism, q, k, v), out, BFLOAT16_OUT)
