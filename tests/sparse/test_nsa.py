"""Native sparse attention: golden numbers, branches of their own, compression. The rest is in `test_mechanisms`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse.compressed import Sizes, overlapping, shares, weights, window_logits
from effattn_jax.sparse.nsa import KV, compressed_branch, nsa, nsa_compress
from effattn_jax.sparse.places import places
from effattn_jax.sparse.pooling import complete_windows, mean_pool, visible
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.golden_inputs import DIGITS, SCALE, waves
from tests.sparse.inputs import randn
from tests.sparse.records.nsa import OPTIONS, SIZES, branches

SMALL = Sizes(4, 2, 8)
BUDGET = {"topk": 3, "init_blocks": 1, "local_blocks": 1}


def block_scores(q, k):
    """As the selection has them, [1, T, 1, blocks]."""
    windows, place = complete_windows(k.shape[1], 4, 2), places(q.shape[1], k.shape[1], None)
    s = window_logits(q, mean_pool(k, windows, 4, 2), visible(windows, 4, place), SCALE)
    met = overlapping(weights(s).sum(3), windows, place, SMALL, k.shape[1] // 8)
    return (met * jnp.asarray(shares(SMALL))).sum(-1)


def test_scores_of_blocks():
    with jax.enable_x64(True):
        q, k, _ = waves(0, 1)
        scores = np.asarray(jit(block_scores)(q, k))[0, :, 0]
    np.testing.assert_allclose(scores[31], (1.065298, 0.866191, 1.861061, 0.207450), rtol=0, atol=DIGITS)
    np.testing.assert_allclose(scores[23], (1.708654, 0.331965, 1.959381, 0), rtol=0, atol=DIGITS)


def test_common_strides():
    assert shares(Sizes(32, 16, 64)) == [1, 2, 2, 2, 1]
    assert shares(Sizes(16, 16, 16)) == [1]
    assert shares(Sizes(64, 16, 32)) == [1, 2, 2, 2, 1]


def test_table():
    sets = {31: {0, 2, 3}, 23: {0, 1, 2}, 9: {0, 1, -1}}
    counts = {0: 1, 8: 9, 16: 17, 24: 17, 31: 24}
    run = jit(partial(nsa, scale=SCALE, window=5, **SIZES, **BUDGET))

    def lists(q, k, v):
        compressed = nsa_compress(k, v, kernel_size=4, kernel_stride=2)
        return compressed_branch(q, compressed, places(32, 32, None), SMALL, blocks=4, scale=SCALE, **BUDGET)[1]

    with jax.enable_x64(True):
        q, k, v = waves(0, 1)
        only = np.broadcast_to(np.eye(3)[:, None, None, None], (3, 1, 32, 2, 3))
        cmp, slc, _ = (np.asarray(run(q, KV(k, v), KV(k, v), KV(k, v), gates)) for gates in only)
        chosen = np.asarray(jit(lists)(q, k, v))
        one_hot = np.eye(32)[None, :, None]
        rows = np.asarray(run(q, *[KV(k, one_hot)] * 3, only[1]))
        seen = np.asarray(run(0 * q, *[KV(k, one_hot)] * 3, only[0]))
    np.testing.assert_allclose(cmp[0, 31, 0], (0.242095, 0.260699, 0.238145, 0.177993), rtol=0, atol=DIGITS)
    for t, visible_windows in {2: 0, 3: 1, 4: 1, 5: 2, 31: 15}.items():
        # each window spreads its weight over four tokens, of which the first two are in no other but the window before
        assert np.count_nonzero(seen[0, t, 0]) == (2 * visible_windows + 2 if visible_windows else 0)
        np.testing.assert_allclose(seen[0, t, 0].sum(), visible_windows > 0)
    np.testing.assert_allclose(slc[0, 31, 0], (0.161273, 0.320661, 0.429423, 0.470390), rtol=0, atol=DIGITS)
    np.testing.assert_allclose(slc[0, :, 0].sum(), 36.538598, rtol=0, atol=DIGITS)
    for t, blocks in sets.items():
        assert set(chosen[0, t, 0].tolist()) == blocks
    for t, count in counts.items():
        assert (np.count_nonzero(rows[0, t], axis=-1) == count).all()


def draw(length=41, dtype=np.float32):
    shape = (2, length, 2, 8)
    q, *arrays = randn(0, (2, length, 4, 8), *[shape, (*shape[:3], 6)] * 3, dtype=dtype)
    gates = 1 / (1 + np.exp(-randn(1, (2, length, 4, 3), dtype=dtype)[0]))
    return 2 * q, *(KV(*arrays[n : n + 2]) for n in (0, 2, 4)), gates


@pytest.mark.slow
def test_branches_have_keys_and_values_of_their_own():
    q, cmp, slc, win, gates = draw()
    as64 = lambda kv: tuple(x.astype(np.float64) for x in kv)  # noqa: E731
    outs, _ = branches(q.astype(np.float64), as64(cmp), as64(slc), as64(win), **SIZES, **OPTIONS)
    want = np.einsum("nbthv,bthn->bthv", outs, gates)
    got = jit(partial(nsa, **SIZES, **OPTIONS))(q, cmp, slc, win, gates)
    assert_close(want, got, FLOAT32)
    compressed = nsa_compress(*cmp, kernel_size=4, kernel_stride=2)
    assert_close(got, jit(partial(nsa, **SIZES, **OPTIONS))(q, compressed, slc, win, gates), 1e-6)


@pytest.mark.slow
def test_gradients_of_every_input_and_of_phi():
    with jax.enable_x64(True):
        inputs = (*draw(dtype=np.float64), *randn(2, (4, 2), (4, 6, 6), dtype=np.float64))
        directions = jax.tree.map(lambda x: np.random.default_rng(x.size).standard_normal(x.shape), inputs)
        (do,) = randn(3, (2, 41, 4, 6), dtype=np.float64)

        def loss(q, cmp, slc, win, gates, of_keys, of_values):
            phi_k = lambda x: jnp.einsum("bwlgk,lg->bwgk", x, of_keys)  # noqa: E731
            phi_v = lambda x: jnp.tanh(jnp.einsum("bwlgv,lvu->bwgu", x, of_values))  # noqa: E731
            return (nsa(q, cmp, slc, win, gates, phi_k=phi_k, phi_v=phi_v, **SIZES, **OPTIONS) * do).sum()

        gradients = jit(jax.grad(loss, range(7)))(*inputs)
        value = jit(loss)
        ends = [value(*jax.tree.map(lambda x, d, s=s: x + s * d, inputs, directions)) for s in (1e-6, -1e-6)]
        got = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradients, directions)), strict=True))
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, got, rtol=1e-6)
        assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_before_the_first_window():
    """No window of 32 is complete: its branch gives 0, and gradients are finite."""
    q, *kv, gates = draw(9)
    gates = np.broadcast_to(np.eye(3, dtype=np.float32)[0], gates.shape)
    loss = lambda q, cmp, slc, win, gates: nsa(q, cmp, slc, win, gates).sum()  # noqa: E731
    value, gradients = jit(jax.value_and_grad(loss, range(5)))(q, *kv, gates)
    assert value == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    assert not np.asarray(gradients[1].k).any()
    assert np.asarray(gradients[4])[..., 1].any()


def test_heads_of_a_group_share_their_blocks_and_a_key_is_found_at_any_offset():
    """A single strong key among noise puts its block in front, wherever in the block it is."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((64, 1, 2, 16)).astype(np.float32)
    q[:, :, 1] = 0.1 * q[:, :, 0]
    q /= np.linalg.norm(q[:, :, :1], axis=-1, keepdims=True)
    k = (rng.standard_normal((64, 320, 1, 16)) / 40).astype(np.float32)
    k[np.arange(64), 128 + np.arange(64)] += 200 * q[:, 0, :1]

    def lists(q, k):
        sizes = Sizes(32, 16, 64)
        return compressed_branch(q, nsa_compress(k, k), places(1, 320, None), sizes, blocks=5, scale=1.0, **BUDGET)[1]

    chosen = np.sort(np.asarray(jit(lists)(q, k)), axis=-1)
    np.testing.assert_array_equal(chosen, np.broadcast_to([0, 2, 4], (64, 1, 1, 3)))


@pytest.mark.slow
def test_memory_is_linear_in_length():
    """Scores of all windows are made for some queries at a time."""

    def size(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        gates = jax.ShapeDtypeStruct((1, length, 2, 3), jnp.float32)
        loss = lambda q, k, gates: nsa(q, *[KV(k, k)] * 3, gates, topk=4, window=64).sum()  # noqa: E731
        return jit(jax.grad(loss, (0, 1, 2))).lower(x, x, gates).compile().memory_analysis().temp_size_in_bytes

    assert size(32768) < 4.5 * size(8192)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("topk", {"topk": 2}),
        ("kernel_size", {"kernel_size": 5}),
        ("block_size", {"block_size": 7}),
        ("window", {"window": 0}),
        ("gates", {"gates": np.zeros((2, 9, 4, 2), np.float32)}),
        ("selected", {"selected": KV(*randn(0, (2, 9, 4, 8), (2, 9, 4, 6)))}),
        ("recent", {"recent": KV(*randn(0, (2, 9, 2, 8), (2, 9, 2, 5)))}),
        ("compressed", {"compressed": KV(*randn(0, (2, 8, 2, 8), (2, 8, 2, 6)))}),
    ],
)
def test_bad_arguments(argument, change):
    names = ("q", "compressed", "selected", "recent", "gates")
    arguments = dict(zip(names, draw(9), strict=True)) | SIZES | {"topk": 3} | change
    with pytest.raises(ValueError, match=rf"\b{argument}: got .+; needs .+"):
        nsa(**arguments)
