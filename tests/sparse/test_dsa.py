"""DeepSeek sparse attention: golden numbers, ties, the loss of the indexer. The rest is in `test_mechanisms`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import DSA
from effattn_jax.sparse import query_chunks
from effattn_jax.sparse.dsa import dsa, dsa_tokens, index_scores
from effattn_jax.sparse.indexer_loss import divergence, indexer_loss
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.golden_inputs import DIGITS
from tests.sparse.inputs import randn
from tests.sparse.records.dsa import tokens


def golden():
    i, c = np.arange(32)[:, None], np.arange(4)[None]
    q = np.stack([np.sin(0.9 * i + 0.7 * c + 0.3 * h) for h in range(3)], axis=1)
    w = np.stack([np.cos(0.2 * i[:, 0] + h) for h in range(3)], axis=1) / np.sqrt(12)
    return q[None], np.cos(0.4 * i + 0.6 * c)[None], w[None]


def test_table():
    with jax.enable_x64(True):
        q, k, w = golden()
        scores = np.asarray(jit(index_scores)(q, k, w))[0]
        chosen = np.asarray(jit(partial(dsa_tokens, topk=4))(q, k, w))[0]
    np.testing.assert_allclose(scores[31, :4], (0.004672, 0.275872, 0.528021, 0.679183), rtol=0, atol=DIGITS)
    assert set(chosen[31].tolist()) == {3, 4, 19, 20}
    assert (scores[15, :16] == 0).sum() > 1  # exact ties
    for (_, t), want in tokens(q, k, w, 4).items():
        assert chosen[t].tolist() == want + [-1] * (4 - len(want))


def test_of_equal_scores_the_earlier_token():
    """A zero with a negative weight is -0.0, which is equal to 0.0."""
    k = np.array([1.0, -1, 1, -1, -1, 1, -1], np.float32)[None, :, None]
    q, w = np.ones((1, 7, 1, 1), np.float32), -np.ones((1, 7, 1), np.float32)
    run = jit(partial(dsa_tokens, topk=3))
    assert run(q, k, w)[0, -1].tolist() == [1, 3, 4]
    assert run(0 * q, k, w)[0, -1].tolist() == [0, 1, 2]


TURNED = {  # channel: unit vectors at position 1, of whose 8 channels 0..3 are rotated, (0, 2) by 1 and (1, 3) by 0.01
    0: (0.540302, 0, 0.841471, 0, 0, 0, 0, 0),
    1: (0, 0.999950, 0, 0.010000, 0, 0, 0, 0),
    2: (-0.841471, 0, 0.540302, 0, 0, 0, 0, 0),
    3: (0, -0.010000, 0, 0.999950, 0, 0, 0, 0),
    4: (0, 0, 0, 0, 1, 0, 0, 0),
    7: (0, 0, 0, 0, 0, 0, 0, 1),
}


def test_the_indexer_rotates_halves():
    """Channels i and i + R / 2 are a pair, not neighbours, in queries and keys; what is behind them is not rotated."""
    layer = DSA(8, heads=1, index_heads=1, index_dim=8, topk=4, rngs=nnx.Rngs(0))
    for projection in (layer.index_q_proj, layer.index_k_proj):
        projection.kernel[...] = jnp.eye(8)
    x, positions = np.eye(8, dtype=np.float32)[:, None], np.ones((8, 1), np.int32)
    index_q = np.asarray(layer.ask(x, positions)[1])[:, 0, 0]
    index_k = np.asarray(layer.remember(x, positions)[-1])[:, 0]
    for channel, want in TURNED.items():
        np.testing.assert_allclose(index_q[channel], want, rtol=0, atol=1e-6)
    normed = (np.eye(8) - 1 / 8) / np.sqrt(7 / 64)  # mean 1 / 8, variance 1 / 8 - 1 / 64
    turned = np.stack([TURNED.get(channel, np.eye(8)[channel]) for channel in range(8)])
    np.testing.assert_allclose(index_k, normed @ turned, rtol=0, atol=1e-3)  # the epsilon of the norm


def test_chunks_of_queries_change_nothing(monkeypatch):
    inputs = randn(0, (2, 50, 3, 4), (2, 50, 4), (2, 50, 3))
    run = lambda *x: dsa_tokens(*x, topk=9)  # noqa: E731
    want = jit(run)(*inputs)
    monkeypatch.setattr(query_chunks, "IN_FLIGHT", 2 * 3 * 50 * 7)  # seven queries
    np.testing.assert_array_equal(want, jit(lambda *x: run(*x))(*inputs))


def draw(length=23, keys=29, dtype=np.float32):
    shapes = (2, length, 4, 8), (2, keys, 2, 8), (2, length, 3, 5), (2, keys, 5), (2, length, 3)
    return randn(0, *shapes, dtype=dtype)


def kl(q, k, index_q, index_k, weights, topk=None):
    """[B, T], from the definition."""
    q, k, index_q, index_k, weights = (np.asarray(x, np.float64) for x in (q, k, index_q, index_k, weights))
    (batch, length, heads, dim), (keys, groups) = q.shape, k.shape[1:3]
    chosen = tokens(index_q, index_k, weights, topk or keys)
    loss = np.zeros((batch, length))
    for b, t in np.ndindex(batch, length):
        s = chosen[b, t]
        p = np.zeros(len(s))
        for h in range(heads):
            e = np.exp(k[b, s, h * groups // heads] @ q[b, t, h] / np.sqrt(dim))
            p += e / e.sum()
        p /= p.sum()
        score = np.maximum(index_k[b, s] @ index_q[b, t].T, 0) @ weights[b, t]
        loss[b, t] = (p * (np.log(p) - score + np.log(np.exp(score).sum()))).sum()
    return loss


@pytest.mark.parametrize("topk", [None, 7])
def test_loss_of_the_indexer(topk, monkeypatch):
    inputs = draw()
    run = jit(partial(indexer_loss, topk=topk))
    got = run(*inputs)
    assert_close(kl(*inputs, topk), got, FLOAT32)
    monkeypatch.setattr(query_chunks, "IN_FLIGHT", 8000)  # some queries at a time
    assert_close(got, jit(lambda *x: indexer_loss(*x, topk=topk))(*inputs), 1e-6)


@pytest.mark.parametrize("topk", [None, 7])
def test_gradients_of_the_loss_reach_the_indexer_alone(topk):
    with jax.enable_x64(True):
        inputs = draw(dtype=np.float64)
        directions = randn(1, *(x.shape for x in inputs), dtype=np.float64)
        loss = lambda *x: indexer_loss(*x, topk=topk).sum()  # noqa: E731
        value, gradients = jit(jax.value_and_grad(loss, range(5)))(*inputs)
        assert not any(np.asarray(g).any() for g in gradients[:2])  # q and k are the target's
        moved = [
            kl(*inputs[:2], *(x + s * d for x, d in zip(inputs[2:], directions[2:], strict=True)), topk).sum()
            for s in (1e-6, -1e-6)
        ]
        got = sum(jnp.vdot(g, d) for g, d in zip(gradients[2:], directions[2:], strict=True))
        np.testing.assert_allclose((moved[0] - moved[1]) / 2e-6, got, rtol=1e-6)
        np.testing.assert_allclose(kl(*inputs, topk).sum(), value, rtol=1e-12)


def test_gradient_in_the_scores():
    scores, p = randn(0, (1, 4, 9), (1, 4, 9))
    seen = np.tri(4, 9, 3, dtype=bool)[None]
    p = np.where(seen, np.exp(p), 0)
    p /= p.sum(-1, keepdims=True)
    e = np.where(seen, np.exp(scores), 0)
    gradient = jit(jax.grad(lambda s: divergence(p, s, seen).sum()))(scores)
    assert_close(e / e.sum(-1, keepdims=True) - p, gradient, FLOAT32)


@pytest.mark.parametrize("topk", [None, 7])
def test_loss_of_packed_rows(topk):
    q, k, index_q, index_k, weights = draw(29, 29)
    ids = np.repeat([0, 3, -1], [9, 18, 2])[None].repeat(2, 0).astype(np.int32)
    padding = lambda x: np.where(ids.reshape(2, 29, *(1,) * (x.ndim - 2)) < 0, np.nan, x)  # noqa: E731

    def loss(*x):
        each = indexer_loss(*x, topk=topk, segment_ids=ids)
        return each.sum(), each

    inputs = (q, k, index_q, index_k, weights)
    gradients, got = jit(jax.grad(loss, range(2, 5), has_aux=True))(*map(padding, inputs))
    rows = [kl(*(x[:, a:b] for x in inputs), topk) for a, b in ((0, 9), (9, 27))]
    assert_close(np.concatenate([*rows, np.zeros((2, 2))], 1), got, FLOAT32)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.slow
def test_memory_is_linear_in_length():
    def size(length):
        shapes = (1, length, 2, 16), (1, length, 1, 16), (1, length, 2, 8), (1, length, 8), (1, length, 2)
        x = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

        def loss(q, k, *indexer):
            return dsa(q, k, k, *indexer, topk=64).sum() + indexer_loss(q, k, *indexer, topk=64).sum()

        return jit(jax.grad(loss, range(5))).lower(*x).compile().memory_analysis().temp_size_in_bytes

    assert size(16384) < 4.5 * size(4096)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("index_k", {"index_k": np.zeros((2, 9, 6), np.float32)}),
        ("index_weights", {"index_weights": np.zeros((2, 9, 2), np.float32)}),
        ("index_q", {"index_q": np.zeros((2, 8, 3, 5), np.float32)}),
        ("topk", {"topk": 0}),
    ],
)
def test_bad_arguments(argument, change):
    names = ("q", "k", "index_q", "index_k", "index_weights")
    arguments = dict(zip(names, draw(9, 9), strict=True)) | change
    with pytest.raises(ValueError, match=rf"{argument}: got .+; needs .+"):
        indexer_loss(**arguments)
    with pytest.raises(ValueError, match=rf"{argument}: got .+; needs .+"):
        dsa(v=arguments["k"], **arguments)
