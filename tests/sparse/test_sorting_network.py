"""Which forced blocks a sorting network keeps, against the network itself with numbers in it."""

import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse.nsa import KV, nsa
from effattn_jax.sparse.sorting_network import kept_by_network


def merge(pairs, stage, falling):
    """Pairs (height, block) at places 2^{stage - 1}, ..., 2, 1 apart change places where they are not in order."""
    for step in reversed(range(stage)):
        for low in range(len(pairs)):
            high = low + 2**step
            if low // 2**step % 2 == 0 and (pairs[low][0] > pairs[high][0]) != falling(low):
                pairs[low], pairs[high] = pairs[high], pairs[low]


def network(own, width, scores):
    """All blocks up to `own`, `width` at a time: sorted to rise and joined with the better half so far, to fall."""
    stages, kept = int(np.log2(width)), None
    for start in range(0, own + 1, width):
        pairs = []
        for block in range(start, start + width):
            height = 1.0 if block in (0, own - 1, own) else scores[block] if block < own else 0.0
            pairs.append((height, block if block <= own else -1))
        for stage in range(1, stages):
            merge(pairs, stage, lambda place, stage=stage: place // 2**stage % 2 == 1)
        if kept is not None:
            merge(pairs, stages, lambda place: False)
            pairs[: width // 2] = kept[: width // 2]
        merge(pairs, stages, lambda place: True)
        kept = pairs
    return [block for _, block in kept]


@pytest.mark.parametrize(("width", "topk"), [(8, 1), (8, 2), (64, 2)])
def test_kept_blocks(width, topk):
    got = kept_by_network(40, width, topk)
    scores = np.random.default_rng(0).uniform(0, 0.9, (3, 128))
    for own in range(40):
        for row in scores:
            assert sorted(network(own, width, row)[:topk]) == sorted(got[own])


def test_some_kept_blocks():
    """The first, the last two, or one of each: no order that a person would have chosen."""
    lists = [sorted(row) for row in kept_by_network(10, 8, 2).tolist()]
    assert lists == [[-1, 0], [0, 1], [1, 2], [2, 3], [0, 3], [0, 5], [0, 5], [0, 6], [0, 8], [8, 9]]


@pytest.mark.slow
def test_nsa_reads_the_listed_blocks():
    """A query of block 1, 2, ... reads the block before its own only: a softmax over 4 keys, all of it before it."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 20, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    lists = np.arange(5)[:, None] - 1
    lists[0] = 0
    gates = jnp.zeros((1, 20, 4, 3)).at[..., 1].set(1)
    sizes = {"kernel_size": 4, "kernel_stride": 4, "block_size": 4, "topk": 1, "window": 1}
    out = nsa(q, *(KV(k, v),) * 3, gates, lists=lists, **sizes)
    for t in range(4, 20):
        read = slice(t // 4 * 4 - 4, t // 4 * 4)
        for head in range(4):
            p = np.exp(k[0, read, head // 2] @ q[0, t, head] / np.sqrt(8))
            np.testing.assert_allclose(out[0, t, head], p / p.sum() @ v[0, read, head // 2], atol=1e-5)
    with pytest.raises(ValueError, match=r"^lists: got shape \(4, 1\); needs \[n, topk\] = \[5, 1\]"):
        nsa(q, *(KV(k, v),) * 3, gates, lists=lists[:4], **sizes)
