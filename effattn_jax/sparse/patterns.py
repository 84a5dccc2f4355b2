"""Published patterns as masks, for `masked_attention`.

Windows count visible keys with the query's own, 0 <= p - j < window; papers that count otherwise are converted here.
"""

from collections.abc import Iterable

import numpy as np

from effattn_jax import checks
from effattn_jax.sparse.listed_masks import BlockList, GlobalKeys, GlobalQueries
from effattn_jax.sparse.masks import Causal, Mask, SameBlock, Sinks, Stride, Summary, Window, check_count


def sliding_window(window: int = 1024) -> Mask:
    """0 <= p - j < window (Jiang et al. 2023, arXiv:2310.06825)."""
    return Window(window)


def a_shape(n_init: int = 128, n_local: int = 3968) -> Mask:
    """j < n_init or 0 <= p - j < n_local, j <= p (Xiao et al. 2023, arXiv:2309.17453; Jiang et al. 2024,
    arXiv:2407.02490).

    A key that both hold counts once.
    """
    return Window(n_local) | (Sinks(n_init) & Causal())


def tri_shape(length: int, n_init: int = 128, n_local: int = 512, last: int = 100) -> Mask:
    """`a_shape`, but the last queries of `length` positions read all of the past (arXiv:2407.02490)."""
    check_count("last", last, 0)
    return a_shape(n_init, n_local) | (GlobalQueries(tuple(range(max(0, length - last), length))) & Causal())


def dilated(window: int = 256, rate: int = 2, two_sided: bool = False) -> Mask:
    """p - j = 0, rate, ..., (window - 1) * rate: `window` keys; two-sided as many after (arXiv:2004.05150)."""
    check_count("window", window)
    return Stride(rate) & Window((window - 1) * rate + 1, two_sided)


def strided_sets(l: int = 128) -> tuple[Mask, Mask]:  # noqa: E741
    """The last l keys, and every l-th: p - j = 0, l, 2 l, ...

    Sparse Transformer, Child et al. 2019, arXiv:1904.10509.

    The first set is the one of the published code; that of the paper, {max(0, p - l), ..., p}, has l + 1 keys. Together
    they reach the whole past in two steps: give them to heads (`masked_attention(q, k, v, [first, second, ...])`), to
    layers in turn, or to one head (`strided`).
    """
    return Window(l), Stride(l) & Causal()


def strided(l: int = 128) -> Mask:  # noqa: E741
    """Both of `strided_sets`."""
    first, second = strided_sets(l)
    return first | second


def fixed_sets(l: int = 128, c: int = 8, head: int = 0) -> tuple[Mask, Mask]:  # noqa: E741
    """The block of l tokens so far, and the last c of every block of l: floor(j / l) = floor(p / l), j mod l >= l - c,
    j <= p (Sparse Transformer, arXiv:1904.10509).

    Heads may summarize by columns of their own: head n takes the c before those of head n - 1, and the head that finds
    none left begins again.
    """
    check_count("l", l)
    check_count("c", c)
    if c > l:
        checks.fail("c", c, f"at most l = {l}")
    check_count("head", head, 0)
    return SameBlock(l) & Causal(), Summary(l, c, head % (l // c) * c) & Causal()


def fixed(l: int = 128, c: int = 8, head: int = 0) -> Mask:  # noqa: E741
    """Both of `fixed_sets`."""
    first, second = fixed_sets(l, c, head)
    return first | second


def longformer(window: int = 256, positions: Iterable[int] = (0,)) -> Mask:
    """|p - j| <= window, or p or j is one of the global positions; not causal (Beltagy et al. 2020, arXiv:2004.05150).

    `window` is the paper's: keys on each side, 2 * window + 1 in all. Global tokens with projections of their own:
    `effattn_jax.sparse.longformer`.
    """
    check_count("window", window, 0)
    positions = tuple(positions)
    return Window(window + 1, two_sided=True) | GlobalKeys(positions) | GlobalQueries(positions)


def bigbird(length: int, heads: int, block: int = 64, rand: int = 3, seed: int = 0) -> list[Mask]:
    """A mask for each head: first and last block, neighbours and random blocks; not causal (Zaheer et al. 2020,
    arXiv:2007.14062).

    Of N blocks, the rows 0 and N - 1 read all. Row i reads {0, i - 1, i, i + 1, N - 1} and `rand` others, row 1
    {0, 1, 2, N - 1} and others than N - 2, row N - 2 {0, N - 3, N - 2, N - 1} and others than 1. The others are drawn
    once by NumPy from the seed, uniformly from all blocks: the published code draws from the first ones for some
    lengths. `length` is that of the keys; the last block may be shorter.
    """
    for name, value, least in (("length", length, 1), ("heads", heads, 1), ("block", block, 1), ("rand", rand, 0)):
        check_count(name, value, least)
    blocks = -(-length // block)
    if blocks < 5 + rand:
        checks.fail(
            "length", f"{length} tokens, {blocks} blocks", f"at least {5 + rand} blocks; shorter rows are dense"
        )
    rng = np.random.default_rng(seed)
    return [BlockList(_bigbird_table(blocks, rand, rng), block, block) for _ in range(heads)]


def _bigbird_table(blocks: int, rand: int, rng: np.random.Generator) -> np.ndarray:
    table = np.zeros((blocks, blocks), bool)
    table[[0, -1]] = True
    table[:, [0, -1]] = True
    for row in range(1, blocks - 1):
        table[row, row - 1 : row + 2] = True
        taken = table[row].copy()
        if row == 1:
            taken[-2] = True
        if row == blocks - 2:
            taken[1] = True
        table[row, rng.choice(np.flatnonzero(~taken), rand, replace=False)] = True
    return table
