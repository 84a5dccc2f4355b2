"""Longformer with projections of their own for global tokens, against two softmaxes by brute force."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention
from effattn_jax.sparse.longformer import longformer_attention
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.brute_force import brute_force
from tests.sparse.inputs import documents, qkv, randn

NAMES = ("q", "k", "v", "q_global", "k_global", "v_global")


def inputs(length, keys=None):
    arrays = [*qkv(length, keys, key_dim=6, value_dim=5), *qkv(length, keys, key_dim=6, value_dim=5, seed=7)]
    return dict(zip(NAMES, arrays, strict=True))


def by_brute_force(arrays, positions, window, do, ids=None):
    """Out and the gradients of sum(out * do), the rows of global tokens apart from the others."""
    (batch, length, heads, _), keys = arrays["q"].shape, arrays["k"].shape[1]
    ids = np.zeros((batch, keys), int) if ids is None else ids
    local, of_all = (np.zeros((batch, heads, length, keys), bool) for _ in range(2))
    for b, t, j in np.ndindex(batch, length, keys):
        p = keys - length + t
        if ids[b, p] == ids[b, j] >= 0:
            if p in positions[b]:
                of_all[b, :, t, j] = True
            else:
                local[b, :, t, j] = abs(p - j) <= window or j in positions[b]
    (out, _), gradients = brute_force(local, *(arrays[name] for name in NAMES[:3]), do)
    (rows, _), others = brute_force(of_all, *(arrays[name] for name in NAMES[3:]), do)
    return out + rows, dict(zip(NAMES, (*gradients, *others), strict=True))  # a row without keys is 0


def run(do, **options):
    def loss(arrays, positions, segment_ids=None):
        out = longformer_attention(global_positions=positions, segment_ids=segment_ids, **arrays, **options)
        return (out * do).sum(), out

    return jit(jax.grad(loss, has_aux=True))


CASES = {  # T, M, window, positions of both rows
    "many blocks": (150, 150, 20, [[0, 3, 77, 149], [64, 5, 63, -1]]),
    "the last of the keys": (30, 90, 9, [[0, 40, 70, 89], [60, 60, 60, 59]]),
}
POSITIONS = {  # of 20 tokens
    "beside each other": [[4, 5, 6, 7], [7, 5, 5, 19]],
    "most": [[0, 1, 2, 3], [19, 18, 17, 16]],
    "none": [[-1, 20, 20, 20], [1000, -5, -1, -1]],
    "one, often": [[8, 8, 8, 8], [8, 8, -1, 8]],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_is_two_softmaxes(case):
    length, keys, window, positions = CASES[case]
    arrays = inputs(length, keys)
    (do,) = randn(1, (*arrays["q"].shape[:3], 5))
    gradients, out = run(do, window=window)(arrays, np.array(positions))
    assert_close(by_brute_force(arrays, positions, window, do), (out, gradients), FLOAT32)


def test_any_positions():
    """One program for all."""
    compiled, arrays = jit(partial(longformer_attention, window=2)), inputs(20)
    for name, positions in POSITIONS.items():
        want, _ = by_brute_force(arrays, positions, 2, np.zeros((2, 20, 4, 5)))
        assert_close(want, compiled(global_positions=np.array(positions), **arrays), FLOAT32, name)


@pytest.mark.slow
def test_documents():
    """Global tokens in several documents, and in padding that holds NaN."""
    ids = documents(61)
    arrays = inputs(61)
    positions = np.array([[1, 2, 12, 20, 40, 50, 60], [0, 3, 4, 5, 21, 22, 30]])
    (do,) = randn(1, (*arrays["q"].shape[:3], 5))
    poisoned = {name: np.where(ids[:, :, None, None] < 0, np.nan, x) for name, x in arrays.items()}
    clean = {name: np.where(ids[:, :, None, None] < 0, 0, x) for name, x in arrays.items()}
    gradients, out = run(do, window=4)(poisoned, positions, ids)
    assert_close(by_brute_force(clean, positions, 4, do, ids), (out, gradients), FLOAT32)


@pytest.mark.slow
def test_a_window_of_everything_is_dense_attention():
    """A global token inside of the window counts once."""
    arrays = dict(list(inputs(40).items())[:3])
    positions = np.array([[0, 20, 39], [5, 6, 7]])
    got = jit(partial(longformer_attention, window=39))(global_positions=positions, **arrays)
    assert_close(attention(causal=False, **arrays), got, FLOAT32)


def test_no_global_tokens_are_a_window():
    arrays = dict(list(inputs(40).items())[:3])
    got = jit(partial(longformer_attention, window=4))(global_positions=np.zeros((2, 0), np.int32), **arrays)
    assert_close(attention(causal=False, window=5, **arrays), got, FLOAT32)


@pytest.mark.slow
def test_memory_is_linear_in_length():
    def size(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        loss = lambda q, k, v, x: longformer_attention(q, k, v, x, window=64).sum()  # noqa: E731
        arguments = shape, shape, shape, jax.ShapeDtypeStruct((1, 4), jnp.int32)
        return jit(jax.grad(loss, (0, 1, 2))).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert size(8192) < 5 * size(2048)


BAD = {
    "a window below none": ("window", {"window": -1}),
    "positions of other rows": ("global_positions", {"global_positions": np.zeros((1, 3), np.int32)}),
    "positions between tokens": ("global_positions", {"global_positions": np.zeros((2, 3), np.float32)}),
    "other global queries": ("q_global", {"q_global": np.zeros((2, 8, 2, 16), np.float32)}),
    "other global keys": ("k_global", {"k_global": np.zeros((2, 7, 2, 16), np.float32)}),
    "fewer keys than queries": ("k", {"q": np.zeros((2, 9, 4, 16), np.float32)}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    argument, change = BAD[case]
    q, k, v = qkv(8)
    arguments = {"q": q, "k": k, "v": v, "global_positions": np.zeros((2, 1), np.int32)} | change
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+"):
        longformer_attention(**arguments)
