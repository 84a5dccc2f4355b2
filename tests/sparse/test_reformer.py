"""Hashed chunks, against a loop over rounds, tokens and pairs in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse.reformer import random_rotations, reformer_attention
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.inputs import randn
from tests.sparse.records.reformer import expected

OPTIONS = ("bucket_size", "causal", "same_bucket", "count_once", "scale")
run = jit(reformer_attention, static_argnames=OPTIONS)


def draw(length, rounds=3, buckets=4):
    qk, v, rotations = randn(0, (2, length, 2, 8), (2, length, 2, 5), (rounds, 8, buckets // 2))
    return 2 * qk, v, rotations


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"count_once": True}, {"same_bucket": True}, {"same_bucket": True, "count_once": True}],
    ids=str,
)
def test_is_the_softmax_over_the_tokens_that_meet(options):
    qk, v, rotations = draw(48)
    want = expected(qk, v, rotations, 8, **options)
    assert_close(want, run(qk, v, rotations, bucket_size=8, **options), FLOAT32)


@pytest.mark.slow
def test_one_chunk_is_dense_attention_of_shared_queries_and_keys():
    qk, v, rotations = draw(20)
    everything = np.zeros((2, 8, 1))  # one bucket, in the order of the row
    want = expected(qk, v, everything, 20)
    assert_close(want, run(qk, v, everything, bucket_size=20, count_once=True), FLOAT32)
    assert_close(want, run(qk, v, np.repeat(rotations, 2, 0), bucket_size=20, count_once=True), FLOAT32)


def test_a_ragged_row_in_which_padding_takes_no_part():
    qk, v, rotations = draw(40)
    ids = np.array([[0] * 37 + [-1] * 3, [0] * 20 + [1] * 20], np.int32)
    poisoned = [np.where(ids[:, :, None, None] < 0, np.nan, x) for x in (qk, v)]
    out = run(*poisoned, rotations, bucket_size=16, segment_ids=ids)
    assert not np.asarray(out[0, 37:]).any()
    assert np.isfinite(out).all()
    changed = np.concatenate([v[:, :20], v[:, 20:] + 1], 1)
    other = run(qk, changed, rotations, bucket_size=16, segment_ids=ids)
    np.testing.assert_array_equal(out[1, :20], other[1, :20])  # documents apart
    assert run(qk[:, :13], v[:, :13], rotations, bucket_size=4).shape == (2, 13, 2, 5)


def test_hashes_do_not_see_length_and_like_tokens_meet():
    qk, v, _ = draw(48)
    rotations = np.asarray(random_rotations(jax.random.key(0), 3, 8, 4))
    qk[:, 40] = qk[:, 3]  # alike, far from each other
    weights = np.broadcast_to(np.eye(48, dtype=np.float32)[None, :, None], (2, 48, 2, 48))
    seen = np.asarray(run(qk, weights, rotations, bucket_size=24))[:, 40, :, 3]
    assert (seen > 0).all()
    length = np.exp(randn(1, (2, 48, 1, 1))[0])
    options = {"bucket_size": 8, "scale": 1e-6}
    assert_close(run(qk, v, rotations, **options), run(qk * length, v, rotations, **options), 1e-4)


@pytest.mark.slow
def test_gradients():
    qk, v, rotations = draw(24)
    with jax.enable_x64(True):
        qk, v, rotations = (x.astype(np.float64) for x in (qk, v, rotations))
        do, dx, dv = randn(1, v.shape, qk.shape, v.shape, dtype=np.float64)
        loss = lambda qk, v, r: (reformer_attention(qk, v, r, bucket_size=8) * do).sum()  # noqa: E731
        grads = jit(jax.grad(loss, (0, 1, 2)))(qk, v, rotations)
        ends = [jit(loss)(qk + s * dx, v + s * dv, rotations) for s in (1e-6, -1e-6)]
        got = jnp.vdot(grads[0], dx) + jnp.vdot(grads[1], dv)
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, got, rtol=1e-6)
    assert not np.asarray(grads[2]).any()


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("v", {"v": np.zeros((2, 7, 2, 5), np.float32)}),
        ("rotations", {"rotations": np.zeros((3, 7, 2), np.float32)}),
        ("bucket_size", {"bucket_size": 0}),
        ("qk", {"qk": np.zeros((2, 8, 2, 8), np.int32)}),
    ],
)
def test_bad_arguments(argument, change):
    qk, v, rotations = draw(8)
    with pytest.raises(ValueError, match=rf"{argument}: got .+; needs .+"):
        reformer_attention(**({"qk": qk, "v": v, "rotations": rotations, "bucket_size": 4} | change))


def test_an_odd_number_of_buckets():
    with pytest.raises(ValueError, match="buckets: got 5; needs"):
        random_rotations(jax.random.key(0), 1, 8, 5)
