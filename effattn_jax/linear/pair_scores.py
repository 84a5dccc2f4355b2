"""Vector gates along a chunk, and scores between its tokens under them.

    A_ij = sum_d x_id y_jd e^{G_id - G_jd}        G_i = g_1 + ... + g_i, g <= 0 per channel, j <= i

is no masked matrix product, and the factors x e^G and y e^{-G} overflow. Halve the chunk, its halves, and so on: each
pair i > j lies on the two sides of exactly one middle m, the last token of a left half, where

    e^{G_i - G_j} = e^{G_i - G_m} e^{G_m - G_j},     i in the right half, j in the left,

has two factors with exponents <= 0. So all pairs are log2 C sets of matrix products, and no tensor of C x C x K is ever
made, not even in blocks: log2 C exponentials per token and channel do. Sums reach out from the middles, without
differences of large numbers: e^{-s} s is small whatever s, so float32 sums are exact enough under any gates, and the
gradient of a gate is a sum over the pairs around it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.precision import contract
from effattn_jax.typing import Array, Bool, Float


class VectorDecaySums(NamedTuple):
    """Sums of the gates of C tokens; the halves of a level have h = 1, 2, 4, ... tokens, C filled up with gates 0."""

    to_middle: tuple[Float[Array, "... n h K"], ...]  # G_m - G_j of the left halves
    from_middle: tuple[Float[Array, "... n h K"], ...]  # G_i - G_m of the right halves
    prefix: Float[Array, "... C K"]  # G_i
    suffix: Float[Array, "... C K"]  # G_C - G_i

    @property
    def from_start(self) -> Float[Array, "... C K"]:
        """e^{G_i}: what token i finds of the state that enters the chunk, after its own decay."""
        return jnp.exp(self.prefix)

    @property
    def from_start_before(self) -> Float[Array, "... C K"]:
        """e^{G_i - g_i}: the same before its own decay."""
        return jnp.concatenate([jnp.ones_like(self.prefix[..., :1, :]), self.from_start[..., :-1, :]], -2)

    @property
    def to_end(self) -> Float[Array, "... C K"]:
        """e^{G_C - G_i}: what the state that leaves the chunk keeps of the write of token i."""
        return jnp.exp(self.suffix)

    @property
    def keep(self) -> Float[Array, "... K"]:
        """e^{G_C}: what the whole chunk keeps of the state that enters."""
        return jnp.exp(self.prefix[..., -1, :])


def vector_decay_sums(log_decay: Float[Array, "... C K"]) -> VectorDecaySums:
    """Sums of logarithmic decays along a chunk; tokens that only fill it up have gates 0."""
    size = log_decay.shape[-2]
    prefix = _blocks(_fill(log_decay), 1)
    suffix = jnp.zeros_like(prefix)
    to_middle, from_middle = [], []
    while prefix.shape[-3] > 1:
        (prefix_left, prefix_right), (suffix_left, suffix_right) = _halves(prefix), _halves(suffix)
        to_middle.append(suffix_left)
        from_middle.append(prefix_right)
        prefix = jnp.concatenate([prefix_left, prefix_left[..., -1:, :] + prefix_right], -2)
        suffix = jnp.concatenate([suffix_left + prefix_right[..., -1:, :], suffix_right], -2)
    whole = (prefix[..., 0, :size, :], suffix[..., 0, :size, :])
    return VectorDecaySums(tuple(to_middle), tuple(from_middle), *whole)


def pair_scores(
    x: Float[Array, "... C K"],
    y: Float[Array, "... C K"],
    sums: VectorDecaySums,
    mask: Bool[Array, "... C C"],
    *,
    before: bool = False,
) -> Float[Array, "... C C"]:
    """A_ij = sum_d x_id y_jd e^{G_id - G_jd} for j <= i where `mask`, else 0; in float32.

    Args:
      x: the side of the queries, which read at i.
      y: the side of the keys, which write at j.
      sums: of the gates of the chunk; leading axes of size 1 serve all of those of x and y.
      mask: broadcasts against the scores; what is above the diagonal is 0 in any case.
      before: i reads before its own decay, e^{G_i - g_i - G_j} for j < i; the diagonal is 0.

    The products are taken in the dtype of x and y. The backward pass recomputes the exponentials level by level.
    """
    if before:  # before the decay of i is after that of i - 1: read there, and move the rows down
        x = jnp.concatenate([x[..., 1:, :], jnp.zeros_like(x[..., :1, :])], -2)
    [[scores]] = all_pair_scores([x], [y], sums, jnp.ones((), bool))
    if before:
        scores = jnp.concatenate([jnp.zeros_like(scores[..., :1, :]), scores[..., :-1, :]], -2)
    return jnp.where(mask, scores, 0)


def all_pair_scores(
    xs: Sequence[Float[Array, "... C K"]],
    ys: Sequence[Float[Array, "... C K"]],
    sums: VectorDecaySums,
    mask: Bool[Array, "... C C"],
) -> list[list[Float[Array, "... C C"]]]:
    """Of each x (rows) with each y: all share the exponentials."""
    size = xs[0].shape[-2]
    xs, ys = [_fill(x) for x in xs], [_fill(y) for y in ys]
    # Of blocks of one token: no decay.
    scores = [[contract("...ik,...ik->...i", x, y)[..., None, None] for y in ys] for x in xs]
    for to_middle, from_middle in zip(sums.to_middle, sums.from_middle, strict=True):
        half = to_middle.shape[-2]
        right, left = [_halves(_blocks(x, half))[1] for x in xs], [_halves(_blocks(y, half))[0] for y in ys]
        across = _across_middle(right, left, to_middle, from_middle)
        scores = jax.tree.map(_merge, scores, across)
    return jax.tree.map(lambda xy: jnp.where(mask, xy[..., 0, :size, :size], 0), scores)


@jax.checkpoint
def _across_middle(
    xs: Sequence[Array], ys: Sequence[Array], to_middle: Array, from_middle: Array
) -> list[list[Float[Array, "... n h h"]]]:
    """Scores of the right half with the left one."""
    xs = [(x * jnp.exp(from_middle)).astype(x.dtype) for x in xs]
    ys = [(y * jnp.exp(to_middle)).astype(y.dtype) for y in ys]
    return [[contract("...nik,...njk->...nij", x, y) for y in ys] for x in xs]


def _merge(scores: Float[Array, "... 2n h h"], across: Float[Array, "... n h h"]) -> Float[Array, "... n 2h 2h"]:
    """The scores of two halves, and of the right one with the left one, are those of a block."""
    left, right = _halves(scores)
    above = jnp.concatenate([left, jnp.zeros_like(left)], -1)
    return jnp.concatenate([above, jnp.concatenate([across, right], -1)], -2)


def _fill(x: Float[Array, "... C K"]) -> Array:
    """Zeros up to a power of two tokens."""
    size = x.shape[-2]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, (1 << (size - 1).bit_length()) - size), (0, 0)])


def _blocks(x: Float[Array, "... C K"], size: int) -> Float[Array, "... n h K"]:
    return x.reshape(*x.shape[:-2], x.shape[-2] // size, size, x.shape[-1])


def _halves(blocks: Float[Array, "... 2n h K"]) -> tuple[Array, Array]:
    """Neighbouring blocks, the left and the right half of a block of the next level."""
    pairs = blocks.reshape(*blocks.shape[:-3], blocks.shape[-3] // 2, 2, *blocks.shape[-2:])
    return pairs[..., 0, :, :], pairs[..., 1, :, :]
