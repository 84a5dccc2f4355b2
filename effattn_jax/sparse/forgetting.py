"""Forgetting attention (FoX): a softmax whose logits fade with forget gates (Lin et al. 2025, arXiv:2503.02130).

    o_i = sum_{j <= i} e^{s_ij} v_j / sum_{j <= i} e^{s_ij}        s_ij = scale * q_i . k_j + f_{j+1} + ... + f_i

A block of queries visits the blocks of keys up to its own, with a running maximum; it is recomputed in the backward
pass, so memory is linear in T. A difference of float32 sums of f would lose 6e-8 of the sums, not of the difference:
a gate is split into a multiple of 1/256, whose sums are whole numbers and exact, and the small rest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.precision import accumulation_dtype, contract, zeros_varying
from effattn_jax.sparse.documents import real_only
from effattn_jax.sparse.mask import same_document
from effattn_jax.sparse.path import Part, merge, softmax_part
from effattn_jax.typing import Array, Float, Int, Queries, SegmentIds

BLOCK = 128
STEPS = 256  # whole steps of a gate of 1; sums over a row are exact down to -2^31 / STEPS


class ForgetSum(NamedTuple):
    """F_i = f_1 + ... + f_i as steps_i / STEPS + fine_i."""

    steps: Int[Array, "B T H"]
    fine: Float[Array, "B T H"]

    def __sub__(self, other: "ForgetSum") -> Array:
        return (self.steps - other.steps).astype(self.fine.dtype) / STEPS + (self.fine - other.fine)


def forget_sum(log_forget: Float[Array, "B T H"]) -> ForgetSum:
    whole = jax.lax.stop_gradient(jnp.round(log_forget * STEPS))
    return ForgetSum(jnp.cumsum(whole.astype(jnp.int32), axis=1), jnp.cumsum(log_forget - whole / STEPS, axis=1))


def forgetting_attention(
    q: Queries,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    log_forget: Float[Array, "B T H"],
    *,
    scale: float | None = None,
    segment_ids: SegmentIds | None = None,
) -> Float[Array, "B T H V"]:
    """o_i = sum_{j <= i} softmax_j(scale * q_i . k_j + f_{j+1} + ... + f_i) v_j.

    f = 0 is softmax attention, a constant f is ALiBi with the slope -f (Press et al. 2022, arXiv:2108.12409).

    Args:
      q: [B, T, H, K] queries.
      k, v: [B, T, G, K], [B, T, G, V]; G divides H, each key head serves H / G consecutive query heads.
      log_forget: f [B, T, H] <= 0, the natural logarithm of the forget gate of each query head.
      scale: factor on the dot products; None means K**-0.5.
      segment_ids: [B, T] documents of packed rows; negative ids mark padding, which is not read and reads zero.

    Returns:
      out [B, T, H, V] in q's dtype, accumulated in float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes, dtypes, head counts or segment ids that do not fit.
    """
    check_forgetting(q, k, v, log_forget, segment_ids)
    if segment_ids is None:
        ids = jnp.zeros(q.shape[:2], jnp.int32)
    else:
        ids = jnp.asarray(segment_ids)
        q, k, v, log_forget = (real_only(x, ids) for x in (q, k, v, log_forget))
    sums = forget_sum(log_forget.astype(accumulation_dtype(q.dtype)))
    return attend(q, k, v, sums, sums, ids, ids, offset=0, scale=scale)


def attend(
    q: Queries,
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    query_sums: ForgetSum,
    key_sums: ForgetSum,
    query_ids: Int[Array, "B T"],
    key_ids: Int[Array, "B M"],
    *,
    offset: int | Int[Array, ""],
    scale: float | None,
) -> Float[Array, "B T H V"]:
    """Queries at positions offset, offset + 1, ... over keys at positions 0, 1, ...; sums from the same origin."""
    batch, length, heads, key_dim = q.shape
    groups = k.shape[2]
    if q.size == 0:
        return jnp.zeros_like(q, shape=(batch, length, heads, v.shape[-1]))
    scale = key_dim**-0.5 if scale is None else scale

    def by_group(sums: ForgetSum) -> ForgetSum:
        return ForgetSum(*(x.reshape(*x.shape[:2], groups, heads // groups) for x in sums))

    q = q.reshape(batch, length, groups, heads // groups, key_dim)
    rows, keys = _block_size(length), _block_size(k.shape[1])
    queries = _to_blocks((q, by_group(query_sums), query_ids), rows)
    blocks = _to_blocks((k, v, by_group(key_sums), key_ids), keys)
    count = jax.tree.leaves(blocks)[0].shape[0]
    accumulate = accumulation_dtype(q.dtype)

    @jax.checkpoint
    def read(inputs: tuple[Array, tuple[Array, ForgetSum, Array]]) -> Float[Array, "B G R C V"]:
        index, (q, query_sums, query_ids) = inputs
        position = offset + index * rows + jnp.arange(rows)
        query_sums = ForgetSum(*(jnp.moveaxis(x, 1, -1)[..., None] for x in query_sums))  # [B, G, R, C, 1]

        @jax.checkpoint
        def part(n: Array, block: tuple[Array, Array, ForgetSum, Array]) -> Part:
            k, v, key_sums, key_ids = block
            key_sums = ForgetSum(*(jnp.moveaxis(x, 1, -1)[..., None, :] for x in key_sums))
            visible = position[:, None] >= n * keys + jnp.arange(keys)
            visible &= same_document(query_ids[:, :, None], key_ids[:, None, :])
            logits = scale * contract("bcgrk,bjgk->bgrcj", q, k) + (query_sums - key_sums)
            logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
            return softmax_part(logits, jnp.moveaxis(v, 1, 2)[:, :, None].astype(accumulate))

        def visit(sofar: Part, numbered: tuple[Array, tuple[Array, Array, ForgetSum, Array]]) -> tuple[Part, None]:
            n, block = numbered
            past = n * keys <= position[-1]
            return jax.lax.cond(past, lambda: merge(sofar, part(n, block)), lambda: sofar), None

        zero = zeros_varying((), accumulate, q, k, v, query_sums.fine, query_ids, key_ids)
        shape = (batch, groups, heads // groups, rows)
        lowest = jnp.finfo(accumulate).min / 2
        none = Part(jnp.full(shape, lowest), jnp.zeros(shape), jnp.zeros((*shape, v.shape[-1])))
        none = Part(*(x.astype(accumulate) + zero for x in none))
        sofar, _ = jax.lax.scan(visit, none, (jnp.arange(count), blocks))
        return sofar.weighted / jnp.where(sofar.total == 0, 1, sofar.total)[..., None]

    out = jax.lax.map(read, (jnp.arange(-(-length // rows)), queries))  # [N, B, G, R, C, V]
    out = jnp.moveaxis(jnp.moveaxis(out, 0, 1), 4, 2).reshape(batch, -1, heads, v.shape[-1])
    return out[:, :length].astype(q.dtype)


def _block_size(length: int) -> int:
    """Of equal blocks of at most BLOCK tokens."""
    return -(-length // -(-length // BLOCK))


def _to_blocks[Tree](tree: Tree, size: int) -> Tree:
    """[B, T, ...] -> [N, B, C, ...]; what is padded comes after all tokens of the row and is never read."""

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, tree)


def check_forgetting(q: Array, k: Array, v: Array, log_forget: Array, segment_ids: SegmentIds | None) -> None:
    """Raise ValueError on what does not fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_rank(name, x, 4, "[B, T, H, K]")
        checks.check_floating(name, x)
    batch, length, heads, key_dim = q.shape
    checks.check_shape("k", k, (batch, length, None, key_dim), "[B, T, G, K]")
    checks.check_head_groups("k", k.shape[2], "q", heads)
    checks.check_shape("v", v, (batch, length, k.shape[2], None), "[B, T, G, V]")
    checks.check_shape("log_forget", log_forget, (batch, length, heads), "[B, T, H]")
    checks.check_floating("log_forget", log_forget)
    checks.check_segment_ids(segment_ids, batch, length)
