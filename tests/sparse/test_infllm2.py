"""InfLLM-v2: golden numbers, and what is its own. The rest is in `test_mechanisms`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention
from effattn_jax.sparse.compressed import Sizes, overlapping, weights, window_logits
from effattn_jax.sparse.infllm2 import infllm2, infllm2_blocks
from effattn_jax.sparse.places import places
from effattn_jax.sparse.pooling import complete_windows, mean_pool, visible
from tests.compiled import jit
from tests.sparse.golden_inputs import DIGITS, SCALE, waves
from tests.sparse.inputs import qkv
from tests.sparse.records.infllm2 import SIZES, blocks


def block_scores(q, k):
    windows, place = complete_windows(k.shape[1], 4, 2), places(q.shape[1], k.shape[1], None)
    s = window_logits(q, mean_pool(k, windows, 4, 2), visible(windows, 4, place), SCALE)
    return overlapping(weights(s).sum(3), windows, place, Sizes(4, 2, 8), k.shape[1] // 8).max(-1)


def test_scores_of_blocks():
    with jax.enable_x64(True):
        q, k, _ = waves(0, 1)
        scores = np.asarray(jit(block_scores)(q, k))[0, :, 0]
    np.testing.assert_allclose(scores[31], (0.489113, 0.489113, 0.506199, 0.074143), rtol=0, atol=DIGITS)
    np.testing.assert_allclose(scores[23], (0.644442, 0.276446, 0.473112, 0), rtol=0, atol=DIGITS)
    assert scores[31, 0] == scores[31, 1]  # they share the window of the maximum


def as_lists(chosen):
    return np.sort(np.asarray(chosen), axis=-1)


@pytest.mark.parametrize("coarse", [False, True])
def test_lists(coarse):
    """Windows of 16 every 8 normalise those of 4 every 2; the first queries see none of them."""
    q, k, _ = qkv(57)
    options = {"topk": 3, "window": 8}
    chosen = as_lists(jit(partial(infllm2_blocks, coarse_lse=coarse, **SIZES, **options))(q, k))
    want = blocks(q.astype(np.float64), k.astype(np.float64), coarse=coarse, **options)
    for (b, h, t), blocks_of in want.items():
        assert chosen[b, t, h // 2].tolist() == sorted(blocks_of + [-1] * (4 - len(blocks_of)))
    if coarse:
        exact = blocks(q.astype(np.float64), k.astype(np.float64), **options)
        assert exact != want  # weights of heads against each other


def test_coarse_normalisation_changes_nothing_for_a_head_alone():
    q, k, _ = qkv(57, heads=2)
    run = [jit(partial(infllm2_blocks, coarse_lse=x, topk=3, window=8, **SIZES)) for x in (False, True)]
    np.testing.assert_array_equal(*(as_lists(f(q, k)) for f in run))


def test_local_blocks_are_one_more_than_the_window_holds():
    q, k, _ = qkv(80)
    chosen = as_lists(jit(partial(infllm2_blocks, topk=2, window=16, init_blocks=0, **SIZES))(0 * q, k))
    assert (chosen[:, -1] == [0, 7, 8, 9]).all()  # of equals the first


def test_short_rows_are_dense():
    q, k, v = qkv(16)
    sparse = {"topk": 2, "window": 0, **SIZES}
    dense = jit(attention)(q, k, v)
    np.testing.assert_array_equal(dense, jit(partial(infllm2, dense_len=17, **sparse))(q, k, v))  # to the bit
    q, k, v = qkv(32)
    dense = jit(attention)(q, k, v)
    assert np.abs(dense - jit(partial(infllm2, dense_len=32, **sparse))(q, k, v)).max() > 0.01


def test_some_adjacent_copies_are_always_found():
    """32 copies fill half of a window at least."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((64, 1, 2, 16)).astype(np.float32)
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    k = (rng.standard_normal((64, 384, 1, 16)) / 4).astype(np.float32)
    for offset in range(64):
        k[offset, 128 + offset : 160 + offset] = 20 * q[offset, 0, :1]
    chosen = np.asarray(jit(partial(infllm2_blocks, topk=3, window=0, scale=1.0))(q, k))[:, 0, 0]
    for offset in range(64):
        assert {(128 + offset) // 64, (159 + offset) // 64} & set(chosen[offset].tolist())


@pytest.mark.slow
def test_memory_is_linear_in_length():
    def size(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        run = partial(infllm2, topk=4, window=64, dense_len=-1, coarse_lse=True)
        loss = lambda q, k, v: run(q, k, v).sum()  # noqa: E731
        return jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert size(32768) < 4.5 * size(8192)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("topk", {"topk": 1}),
        ("window", {"window": 12}),
        ("kernel_size", {"kernel_size": 3}),
        ("dense_len", {"dense_len": None}),
        ("k", {"k": np.zeros((2, 5, 2, 16), np.float32), "v": np.zeros((2, 5, 2, 16), np.float32)}),
    ],
)
def test_bad_arguments(argument, change):
    q, k, v = qkv(8)
    arguments = {"q": q, "k": k, "v": v, "topk": 3, "window": 8, "dense_len": -1, **SIZES} | change
    with pytest.raises(ValueError, match=rf"\b{argument}: got .+; needs .+"):
        infllm2(**arguments)
