"""XAttention: blocks of a prompt are valued by the sums of their antidiagonals, and read until they hold enough."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.block_masks import first_block, lists_of
from effattn_jax.sparse.kv_buffer import check_sizes
from effattn_jax.sparse.query_chunks import over_queries
from effattn_jax.typing import Array, Bool, Float, Int, Queries


def xattention(
    q: Queries,
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    *,
    block_size: int = 128,
    stride: int = 8,
    tau: float | Sequence[float] | Float[Array, " H"] = 0.9,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T H V"]:
    """Causal softmax attention of a prompt over the blocks of `xattention_blocks`.

    XAttention: Xu et al. 2025, arXiv:2503.16428. Not for training: the value of a block depends on queries after the
    first of it. Decoding after it reads everything. The choice costs O(T M K / stride), memory O(T) and blocks by
    blocks.

    Args:
      q: [B, T, H, K] queries, the last T of the M positions; M - T is a multiple of the block. Keys and queries are
        rotated before, where they are.
      k, v: [B, M, G, K] keys and [B, M, G, V] values; G divides H.
      block_size: tokens of a block of queries, and of keys; a multiple of the stride.
      stride: S, side of the tiles whose antidiagonals are summed: 8, or 16 for more speed.
      tau: the part of a row's value that its blocks hold together, for all heads or for each of the H (see
        `search_thresholds`); above 1 everything is read.
      scale: factor on the logits; None means K**-0.5.
      implementation: see `block_attention`.

    Returns:
      [B, T, H, V] in q's dtype. Every head chooses by itself, in float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes, dtypes, head counts or sizes that do not fit.
    """
    check_qkv(q, k, v)
    lists = xattention_blocks(q, k, block_size=block_size, stride=stride, tau=tau, scale=scale)
    return block_attention(
        q, k, v, lists, block_size=block_size, query_block=block_size, scale=scale, implementation=implementation
    )[0]


def xattention_blocks(
    q: Queries,
    k: Float[Array, "B M G K"],
    *,
    block_size: int = 128,
    stride: int = 8,
    tau: float | Sequence[float] | Float[Array, " H"] = 0.9,
    scale: float | None = None,
) -> Int[Array, "B N H n"]:
    """The blocks of keys that each block of queries reads, ascending, -1 behind the last.

    They are the first block and the own one, and of the others up to it those of the greatest values W, each taken
    while the ones before it (the first and the own one before all) hold less than tau of the row's value.
    """
    score = block_scores(q, k, block_size=block_size, stride=stride, scale=scale)
    first = first_block(q.shape[1], k.shape[1], block_size)
    own = first + jnp.arange(score.shape[2])
    tau = jnp.asarray(tau, score.dtype)
    if tau.ndim:
        checks.check_shape("tau", tau, (q.shape[2],), "[H]")
    return lists_of(enough(score, own, tau))


def block_scores(
    q: Queries,
    k: Float[Array, "B M G K"],
    *,
    block_size: int = 128,
    stride: int = 8,
    scale: float | None = None,
) -> Float[Array, "B H N n"]:
    """W: sums of P = softmax_J(scale / S * A_IJ) over the tiles of S x S of a block of queries and one of keys, of

        A_IJ = sum_{r < S} q_{I S + S - 1 - r} . k_{J S + r},  J <= I,

    which is one product of rows of S K numbers. The tiles on the diagonal see the future, by S - 1 tokens."""
    check_numbers(scale, None)
    check_sizes(block_size=block_size, stride=stride)
    if block_size % stride:
        checks.fail("stride", stride, f"a divisor of the block of {block_size}")
    batch, length, heads, key_dim = q.shape
    keys, groups = k.shape[1:3]
    first = first_block(length, keys, block_size)
    count, blocks, tiles = -(-length // block_size), -(-keys // block_size), block_size // stride
    factor = (key_dim**-0.5 if scale is None else float(scale)) / stride
    accumulate = accumulation_dtype(q.dtype)

    def rows(x: Array, size: int) -> Array:
        """[B, size, S, heads, K], of zeros behind the last token."""
        x = jnp.pad(x, ((0, 0), (0, size * stride - x.shape[1]), (0, 0), (0, 0)))
        return x.reshape(batch, size, stride, *x.shape[2:])

    q, k = jax.lax.stop_gradient((q, k))
    reversed_q = jnp.flip(rows(q, count * tiles), axis=2).reshape(batch, count, tiles, stride, groups, -1, key_dim)
    rows_k = rows(k, blocks * tiles)
    row = ((first + jnp.arange(count))[:, None] * tiles + jnp.arange(tiles))[None]  # I
    column = jnp.arange(blocks * tiles)  # J

    def of_chunk(q: Array, row: Array) -> Array:
        s = factor * contract("bnxsgrk,bjsgk->bngrxj", q.astype(accumulate), rows_k.astype(accumulate))
        row = row[:, :, None, None, :, None]
        allowed = (column <= row) & (column * stride < keys)
        p = jax.nn.softmax(jnp.where(allowed, s, -jnp.inf), axis=-1)
        p = jnp.where(row * stride < keys, p, 0)  # rows behind the last query
        p = p.reshape(*p.shape[:2], heads, tiles, blocks, tiles)
        return jnp.sum(p, axis=(3, 5))

    score = over_queries(of_chunk, batch * heads * tiles * blocks * tiles, reversed_q, row)
    return jnp.moveaxis(score, 1, 2)


def enough(
    score: Float[Array, "B H N n"], own: Int[Array, " N"], tau: Float[Array, ""] | Float[Array, " H"]
) -> Bool[Array, "B H N n"]:
    """The blocks that are read; sums are in float32 at least, because tau is close to 1 and blocks are many."""
    block = jnp.arange(score.shape[-1])
    past = block <= own[:, None]
    forced = (block == 0) | (block == own[:, None])
    score = jnp.where(past, score, 0).astype(accumulation_dtype(score.dtype))
    order = jnp.argsort(jnp.where(forced, -jnp.inf, -score), axis=-1, stable=True)
    until = jnp.cumsum(jnp.take_along_axis(score, order, axis=-1), axis=-1)
    before = jnp.pad(until[..., :-1], ((0, 0), (0, 0), (0, 0), (1, 0)))
    taken = before < (tau[:, None, None] if tau.ndim else tau) * until[..., -1:]
    return (jnp.take_along_axis(taken, jnp.argsort(order, axis=-1), axis=-1) | forced) & past


def search_thresholds(scores: np.ndarray, reductions: int, *, start: float = 0.9, factor: float = 0.9) -> np.ndarray:
    """Thresholds [H] = start * factor^{r_h} with sum_h r_h = reductions and the greatest sum_h scores[h, r_h].

    scores: [H, R + 1], how well head h does after r reductions of its threshold, by a measure that adds up over heads
    (on samples, offline). By dynamic programming over heads, D_h[m] = max_r D_{h-1}[m - r] + scores[h, r]; of equal
    choices the fewest reductions of the later head. O(H reductions R).

    Raises:
      ValueError: scores that are no table; more reductions than H R.
    """
    scores = np.asarray(scores, np.float64)
    checks.check_rank("scores", scores, 2, "[H, R + 1]")
    heads, most = scores.shape[0], scores.shape[1] - 1
    if not 0 <= reductions <= heads * most:
        checks.fail("reductions", reductions, f"from 0 to {heads * most}, {most} for each of {heads} heads")
    best = np.where(np.arange(reductions + 1) == 0, 0.0, -np.inf)
    choice = np.zeros((heads, reductions + 1), np.int64)
    for head in range(heads):
        shifted = np.full((most + 1, reductions + 1), -np.inf)
        for r in range(min(most, reductions) + 1):
            shifted[r, r:] = best[: reductions + 1 - r] + scores[head, r]
        choice[head] = np.argmax(shifted, axis=0)
        best = np.max(shifted, axis=0)
    result, left = np.zeros(heads), reductions
    for head in reversed(range(heads)):
        result[head] = start * factor ** choice[head, left]
        left -= choice[head, left]
    return result
