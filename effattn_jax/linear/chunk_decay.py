"""Gates of either kind over the chunks of packed rows: what decays between two tokens, into a chunk and out of it.

With G_i = g_1 + ... + g_i along a chunk, every exponent <= 0, and zero wherever another document lies in between:

    scores  sum_d x_id y_jd e^{G_id - G_jd}      into  e^{G_i}      out  e^{G_C - G_i}      keep  e^{G_C}
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax.numpy as jnp

from effattn_jax.linear.chunks import to_chunks
from effattn_jax.linear.decay import decay_sum, pairwise_decay
from effattn_jax.linear.pair_scores import all_pair_scores, vector_decay_sums
from effattn_jax.linear.segments import chunk_masks
from effattn_jax.precision import contract
from effattn_jax.typing import Array, Float, SegmentIds


class Scores(Protocol):
    def __call__(
        self, keys: Sequence[Array], after: Sequence[Array], before: Sequence[Array] = ()
    ) -> list[list[Float[Array, "B N H C C"]]]:
        """Of each x that reads (rows) with each y of `keys`, for j <= i: [[x_1 y_1, x_1 y_2, ...], ...].

        Those of `after` read after the decay of their token. Those of `before`, which follow, read before it: e^{E_i}
        with E_i = G_i - g_i in place of e^{G_i}, for j < i.
        """


class ChunkDecay(NamedTuple):
    """Axes of size 1 serve all; the last but `keep`'s is 1 where all channels decay alike, else K."""

    scores: Scores
    into: Float[Array, "B N H C 1|K"]  # what token i finds of the state that enters
    into_before: Float[Array, "B N H C 1|K"]  # the same before its own decay
    out: Float[Array, "B N H C 1|K"]  # what the state that leaves keeps of the write of token i
    keep: Float[Array, "B N H 1|K 1"]  # and of the state that enters


def chunk_decay(log_decay: Float[Array, "B T H 1|K"] | None, segment_ids: SegmentIds | None, chunk: int) -> ChunkDecay:
    """Of one gate per token and head, or one per channel; None is no decay."""
    if log_decay is None:
        gates = jnp.zeros((1, 1, 1, chunk, 1), jnp.float32)
    elif segment_ids is None:
        gates = split_heads(log_decay, chunk)
    else:
        gates = split_heads(jnp.where(segment_ids[..., None, None] >= 0, log_decay, 0), chunk)
    scores, into, out = (_scalar if gates.shape[-1] == 1 else _vector)(gates)
    before = jnp.concatenate([jnp.ones_like(into[..., :1, :]), into[..., :-1, :]], -2)
    keep = into[..., -1, :, None]
    if segment_ids is None:
        return ChunkDecay(scores, into, before, out, keep)
    masks = chunk_masks(to_chunks(segment_ids, chunk, fill=-1))
    enters, leaves = masks.into[:, :, None, :, None], masks.out[:, :, None, :, None]

    def inside(keys: Sequence[Array], after: Sequence[Array], before: Sequence[Array] = ()) -> list[list[Array]]:
        mask = masks.inside[:, :, None]
        return [[jnp.where(mask, xy, 0) for xy in row] for row in scores(keys, after, before)]

    return ChunkDecay(inside, into * enters, before * enters, out * leaves, keep * masks.keep[:, :, None, None, None])


def _scalar(gates: Float[Array, "B N H C 1"]) -> tuple[Scores, Array, Array]:
    """(X Y^T) * D with D_ij = e^{G_i - G_j}."""
    sums = decay_sum(gates[..., 0])
    decay = pairwise_decay(sums, _lower(gates))

    def scores(keys: Sequence[Array], after: Sequence[Array], before: Sequence[Array] = ()) -> list[list[Array]]:
        decays = [decay] * len(after) + [_down(decay)] * len(before)
        return [
            [contract("...ik,...jk->...ij", x, y) * d for y in keys]
            for x, d in zip((*after, *before), decays, strict=True)
        ]

    return scores, jnp.exp(sums.total)[..., None], jnp.exp(sums.to_end)[..., None]


def _vector(gates: Float[Array, "B N H C K"]) -> tuple[Scores, Array, Array]:
    """All pairs at once: they share the exponentials."""
    sums = vector_decay_sums(gates)

    def scores(keys: Sequence[Array], after: Sequence[Array], before: Sequence[Array] = ()) -> list[list[Array]]:
        reads = [*after, *map(_up, before)]
        pairs = all_pair_scores(reads, keys, sums, _lower(gates))
        return pairs[: len(after)] + [[_down(xy) for xy in row] for row in pairs[len(after) :]]

    return scores, sums.from_start, sums.to_end


def _lower(gates: Array) -> Array:
    size = gates.shape[-2]
    return jnp.tril(jnp.ones((size, size), bool))


def _up(x: Float[Array, "... C K"]) -> Array:
    """What reads before the decay of token i reads after that of i - 1."""
    return jnp.concatenate([x[..., 1:, :], jnp.zeros_like(x[..., :1, :])], -2)


def _down(scores: Float[Array, "... C C"]) -> Array:
    """Back again: rows move down by one, and the first one reads nothing."""
    return jnp.concatenate([jnp.zeros_like(scores[..., :1, :]), scores[..., :-1, :]], -2)


def split_heads(x: Float[Array, "B T H *D"], chunk: int) -> Float[Array, "B N H C *D"]:
    """Chunks, with heads before the tokens of a chunk."""
    return jnp.moveaxis(to_chunks(x, chunk), 2, 3)
