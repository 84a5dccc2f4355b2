"""Which of equal blocks a bitonic sorting network keeps, where fewer are kept than are forced.

flash-linear-attention's kernel for NSA gives the first block, the query's own and the one before it the same score,
above all others, and sorts `width` blocks at a time. Where a query has room for all three the network is of no
consequence. Comparisons among the others do not move the three: which of them are kept depends on the own block only.
"""

import numpy as np

from effattn_jax.typing import Bool, Int


def kept_by_network(blocks: int, width: int, topk: int) -> Int[np.ndarray, "blocks topk"]:
    """The lists of queries in block 0, 1, ..., where topk < 3; -1 fills them up.

    Args:
      width: blocks the network sorts at once, a power of two; the kernel's is the number of tokens of a block.
    """
    ids, forced = np.zeros((blocks, width), int), np.zeros((blocks, width), bool)
    place, stages = np.arange(width), width.bit_length() - 1
    falling = np.ones(width, bool)
    for start in range(0, blocks, width):
        own, block = np.arange(start, blocks)[:, None], start + place  # of queries that get so far
        found = (block == 0) | (block == own) | (block == own - 1)
        of = np.where(block <= own, block, -1)
        for stage in range(1, stages):  # runs that rise and fall by turns, ever longer
            found, of = _merge(found, of, stage, (place >> stage) % 2 == 1)
        if start > 0:
            found, of = _merge(found, of, stages, ~falling)
            best = place < width // 2
            found, of = np.where(best, forced[start:], found), np.where(best, ids[start:], of)
        forced[start:], ids[start:] = _merge(found, of, stages, falling)
    return ids[:, :topk]


def _merge(
    high: Bool[np.ndarray, "n w"], ids: Int[np.ndarray, "n w"], stage: int, falling: Bool[np.ndarray, " w"]
) -> tuple[Bool[np.ndarray, "n w"], Int[np.ndarray, "n w"]]:
    """Pairs 2^{stage - 1}, ..., 2, 1 apart change places, in falling runs those of equal height too."""
    place = np.arange(high.shape[1])
    for distance in (1 << step for step in reversed(range(stage))):
        lower, upper = place & ~distance, place | distance
        swap = (high[:, lower] & ~high[:, upper]) != falling
        source = np.where(swap, place ^ distance, place)
        high, ids = np.take_along_axis(high, source, 1), np.take_along_axis(ids, source, 1)
    return high, ids
