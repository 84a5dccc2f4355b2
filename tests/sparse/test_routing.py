"""Clusters of queries and keys, against loops in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention
from effattn_jax.sparse.routing import commitment_loss, nearest, routing_attention, update_centroids
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.inputs import randn
from tests.sparse.records.routing import expected, unit

run = jit(routing_attention, static_argnames=("window", "causal", "scale"))


def draw(length=30, clusters=4):
    return randn(0, (2, length, 2, 8), (2, length, 2, 8), (2, length, 2, 5), (2, clusters, 8))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_memory", [True, False])
def test_is_the_mean_over_clusters(causal, with_memory):
    arrays = draw()
    memory = tuple(randn(1, (2, 2, 8), (2, 2, 5))) if with_memory else None
    want = expected(*arrays, 9, causal, memory)
    assert_close(want, run(*arrays, window=9, causal=causal, memory=memory), FLOAT32)


@pytest.mark.slow
def test_one_cluster_of_everything_is_dense_attention():
    q, k, v, centroids = draw(clusters=1)
    assert_close(attention(q, k, v), run(q, k, v, centroids, window=99), FLOAT32)


@pytest.mark.slow
def test_documents_and_padding():
    ids = np.array([[0] * 12 + [1] * 14 + [-1] * 4, [0] * 30], np.int32)
    q, k, v, centroids = draw(clusters=1)
    poisoned = [np.where(ids[:, :, None, None] < 0, np.nan, x) for x in (q, k, v)]
    want = attention(q, k, v, segment_ids=ids)
    assert_close(want, run(*poisoned, centroids, window=30, segment_ids=ids), FLOAT32)


@pytest.mark.slow
def test_gradients():
    arrays = draw()
    with jax.enable_x64(True):
        arrays = [x.astype(np.float64) for x in arrays]
        do, *directions = randn(2, arrays[2].shape, *(x.shape for x in arrays[:3]), dtype=np.float64)
        loss = lambda *x: (routing_attention(*x, window=9) * do).sum()  # noqa: E731
        grads = jit(jax.grad(loss, (0, 1, 2, 3)))(*arrays)
        moved = lambda s: [x + s * d for x, d in zip(arrays[:3], directions, strict=True)]  # noqa: E731
        ends = [jit(loss)(*moved(s), arrays[3]) for s in (1e-6, -1e-6)]
        got = sum(jnp.vdot(g, d) for g, d in zip(grads[:3], directions, strict=True))
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, got, rtol=1e-6)
    assert not np.asarray(grads[3]).any()


@pytest.mark.slow
def test_centroids_move_to_the_mean_of_their_tokens():
    x, _, _, centroids = draw()
    centroids[:, 3] = -100 * unit(x[:, :, 0].mean((0, 1)))  # far from most
    ids = np.array([[0] * 30, [0] * 20 + [-1] * 10], np.int32)
    poisoned = np.where(ids[:, :, None, None] < 0, np.nan, x)
    moved = np.asarray(jit(update_centroids)(centroids, poisoned, segment_ids=ids, decay=0.9))
    loss = 0.0
    for h, c in np.ndindex(2, 4):
        near = np.argmax(unit(x[:, :, h]) @ unit(centroids[h]).T, -1)
        mine = unit(x[:, :, h])[(near == c) & (ids >= 0)]
        want = 0.9 * centroids[h, c] + 0.1 * mine.mean(0) if len(mine) else centroids[h, c]
        np.testing.assert_allclose(want, moved[h, c], rtol=1e-5)
        loss += np.square(mine - unit(centroids[h, c])).sum()
    np.testing.assert_allclose(loss / (2 * 50 * 8), commitment_loss(x, centroids, segment_ids=ids), rtol=1e-5)
    assert not np.asarray(jax.grad(commitment_loss, 1)(x, centroids)).any()
    assert np.asarray(jax.grad(commitment_loss)(x, centroids)).any()
    assert nearest(x, centroids).shape == (2, 30, 2)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("k", {"k": np.zeros((2, 9, 2, 8), np.float32), "v": np.zeros((2, 9, 2, 5), np.float32)}),
        ("centroids", {"centroids": np.zeros((3, 4, 8), np.float32)}),
        ("window", {"window": 0}),
        ("memory", {"memory": (np.zeros((2, 1, 7), np.float32), np.zeros((2, 1, 5), np.float32))}),
    ],
)
def test_bad_arguments(argument, change):
    q, k, v, centroids = draw(8)
    with pytest.raises(ValueError, match=rf"{argument}: got .+; needs .+"):
        routing_attention(**({"q": q, "k": k, "v": v, "centroids": centroids, "window": 4} | change))
