"""A budget of the whole row is the same to the bit as a larger one, and as a list of everything."""

from functools import partial

import numpy as np
import pytest

from effattn_jax.sparse import block_attention
from effattn_jax.sparse.dsa import dsa
from effattn_jax.sparse.moba import moba
from tests.compiled import jit
from tests.sparse.inputs import qkv
from tests.sparse.records import double_sparsity, infllm2, nsa, quest

LENGTH, BLOCKS = 37, 5  # of 8 tokens


def by_dsa(q, k, v, topk):
    return dsa(q, k, v, q[:, :, :3], k[:, :, 0], q[:, :, 1:, 0], topk=topk)


def by_infllm2(q, k, v, topk):
    return infllm2._run(q, k, v, topk=topk, window=8)


def by_nsa(q, k, v, topk):
    """The selected branch alone."""
    return nsa.RECORDS[0].dense(q, k, v, topk=topk)


CASES = {  # a function, its budget of the whole row, larger ones, and of a list of everything block size and heads
    "moba": (lambda *x: moba(*x[:3], block_size=8, topk=x[3]), BLOCKS, (6, 70), 8, 4),
    "infllm2": (by_infllm2, BLOCKS - 1, (BLOCKS, 70), 8, 2),  # and a block of the window
    "nsa": (by_nsa, BLOCKS, (6, 70), 8, 2),
    "dsa": (by_dsa, LENGTH, (38, 1000), 1, 2),
    "quest": (quest._run, 40, (44, 400), None, None),
    "double sparsity": (double_sparsity._run, 40, (41, 1000), None, None),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_more_than_everything_is_everything(name):
    run, whole, larger, block_size, heads = CASES[name]
    q, k, v = qkv(LENGTH, key_dim=8)
    run = jit(run, static_argnums=3)
    want = np.asarray(run(q, k, v, whole))
    for budget in larger:
        np.testing.assert_array_equal(want, run(q, k, v, budget))
    if block_size is not None:
        everything = np.arange(-(-LENGTH // block_size), dtype=np.int32)
        lists = np.broadcast_to(everything, (2, LENGTH, heads, len(everything)))
        listed = jit(partial(block_attention, block_size=block_size))(q, k, v, lists)[0]
        np.testing.assert_array_equal(want, listed)
