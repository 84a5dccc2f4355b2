"""LongNet against golden numbers and a softmax with multiplicity."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention
from effattn_jax.sparse.longnet import longnet_attention
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.golden_inputs import DIGITS, SCALE, waves
from tests.sparse.inputs import qkv, randn
from tests.sparse.longnet_oracle import branch_weights, longnet

TABLE = [  # head: rows 30 and 31, and the sum of all
    ((0.596836, 0.820736, 0.915060, 0.864916), (0.320294, 0.003415, -0.314004, -0.581848), 30.344196),
    ((0.765297, 0.769854, 0.652869, 0.432809), (-0.079008, -0.161017, -0.217606, -0.239839), 35.337690),
]


def test_table():
    with jax.enable_x64(True):
        out = jit(partial(longnet_attention, segments=(8, 16), ratios=(1, 2), scale=SCALE))(*waves(0, 1))
        for head, (before, last, total) in enumerate(TABLE):
            np.testing.assert_allclose(out[0, 30:, head], (before, last), rtol=0, atol=DIGITS)
            np.testing.assert_allclose(out[0, :, head].sum(), total, rtol=0, atol=DIGITS)


CASES = {  # T, M, heads, options
    "heads that the ratio does not divide": (23, 23, 3, {"segments": (4, 9), "ratios": (1, 2)}),
    "a ratio above the heads and the segment": (23, 23, 2, {"segments": (4, 6, 9), "ratios": (1, 7, 3)}),
    "the last of the keys, in the middle of segments": (3, 30, 4, {"segments": (4, 12), "ratios": (1, 3)}),
    "both ways, with padding": (
        23,
        23,
        3,
        {"segments": (5, 8, 40), "ratios": (1, 3, 2), "causal": False},
    ),
    "both ways, the last of the keys": (4, 23, 4, {"segments": (6, 9), "ratios": (1, 2), "causal": False}),
}


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("case", CASES)
def test_is_a_softmax_with_multiplicity(case):
    length, keys, heads, options = CASES[case]
    q, k, v = qkv(length, keys, heads=heads, kv_heads=1, key_dim=6, value_dim=5)
    want = longnet(*(x.astype(np.float64) for x in (q, k, v)), **options)
    assert_close(want, jit(partial(longnet_attention, **options))(q, k, v), FLOAT32)


def test_offsets_modulo_the_ratio_are_other_heads():
    """Where the ratio divides the heads, the two ways differ by an order of the heads."""
    q, k, v = qkv(20, kv_heads=1)
    run = lambda q, offset: longnet_attention(q, k, v, segments=(4, 10), ratios=(1, 2), head_offset=offset)  # noqa: E731
    order = np.array([0, 2, 1, 3])
    both = jit(lambda q: (run(q, "contiguous"), run(q[:, :, order], "modulo")))(q)
    assert_close(both[0], both[1][:, :, order], FLOAT32)


def test_one_branch_of_everything_is_dense_attention():
    q, k, v = qkv(20)
    both = jit(lambda *x: (attention(*x), longnet_attention(*x, segments=(64,), ratios=(1,))))(q, k, v)
    assert_close(*both, FLOAT32)


def test_a_log_sum_exp_of_zero_is_a_number():
    """The branch that holds one key only, of logit 0, and the other branch, of one or two."""
    q, k, v = (np.zeros((1, 4, 1, 2), np.float32) for _ in range(3))
    v = v + np.arange(4, dtype=np.float32)[None, :, None, None]
    out = jit(partial(longnet_attention, segments=(1, 4), ratios=(1, 2)))(q, k, v)
    np.testing.assert_allclose(out[0, :, 0, 0], [0, 1, (0 + 2 + 2) / 3, 3], rtol=1e-6)


def test_padding_is_not_read():
    """Not causal, all logits far below the 0 of a padded key."""
    q, k, v = qkv(7, heads=2, kv_heads=1, key_dim=2, value_dim=3)
    q, k = np.full_like(q, 8), np.full_like(k, -8)
    options = {"segments": (4, 8), "ratios": (1, 3), "causal": False}
    want = longnet(*(x.astype(np.float64) for x in (q, k, v)), **options)
    assert_close(want, jit(partial(longnet_attention, **options))(q, k, v), FLOAT32)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("exact", [True, False])
def test_gradients(exact):
    """Of the function, or of the function with constant weights of the branches; differences in float64."""
    options = {"segments": (4, 12), "ratios": (1, 2)}
    with jax.enable_x64(True):
        q, k, v = (x.astype(np.float64) for x in qkv(13, heads=2, kv_heads=1, key_dim=4, value_dim=3))
        do, dq, dk, dv = (x.astype(np.float64) for x in randn(1, (*q.shape[:3], 3), q.shape, k.shape, v.shape))
        loss = lambda q, k, v: (longnet_attention(q, k, v, exact_grad=exact, **options) * do).sum()  # noqa: E731
        got = sum(np.vdot(g, d) for g, d in zip(jit(jax.grad(loss, (0, 1, 2)))(q, k, v), (dq, dk, dv), strict=True))
    alpha = branch_weights(q, k, **options)
    step = 1e-6
    difference = lambda alpha: (  # noqa: E731
        sum(
            s * (longnet(q + s * step * dq, k + s * step * dk, v + s * step * dv, alpha=alpha, **options) * do).sum()
            for s in (1, -1)
        )
        / (2 * step)
    )
    wanted, other = difference(None if exact else alpha), difference(alpha if exact else None)
    np.testing.assert_allclose(wanted, got, rtol=1e-6)
    assert abs(other - got) > 1e-2 * abs(got)


def test_vmap():
    q, k, v = qkv(12, batch=3)
    run = partial(longnet_attention, segments=(3, 8), ratios=(1, 2))
    each = jit(jax.vmap(lambda *row: run(*(x[None] for x in row))[0]))
    assert_close(jit(run)(q, k, v), each(q, k, v), FLOAT32)


@pytest.mark.slow
def test_memory_is_linear_in_length():
    def size(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        run = lambda q, k, v: longnet_attention(q, k, v, segments=(64, 256), ratios=(1, 4)).sum()  # noqa: E731
        compiled = jit(jax.grad(run, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert size(16384) < 5 * size(4096)


BAD = {
    "no branch of all tokens": ("ratios", {"segments": (4, 8), "ratios": (2, 4)}),
    "fewer ratios": ("ratios", {"segments": (4, 8), "ratios": (1,)}),
    "no tokens": ("segments", {"segments": (0,), "ratios": (1,)}),
    "no ratio": ("ratios", {"segments": (4, 4), "ratios": (1, 0)}),
    "unknown offsets": ("head_offset", {"head_offset": "random"}),
    "fewer keys than queries": ("k", {"q": np.zeros((2, 9, 4, 16), np.float32)}),
    "documents of other rows": ("segment_ids", {"segment_ids": np.zeros((2, 7), np.int32)}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    argument, change = BAD[case]
    q, k, v = qkv(8)
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+"):
        longnet_attention(**{"q": q, "k": k, "v": v} | change)
