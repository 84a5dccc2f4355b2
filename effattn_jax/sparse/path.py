"""PaTH: softmax attention whose positions are products of Householder-like steps (Yang et al. 2025, arXiv:2505.16381).

    s_ij = scale * q_i^T (H_i H_{i-1} ... H_{j+1}) k_j,   H_t = I - beta_t w_t w_t^T,   o_i = sum_j softmax_j(s_ij) v_j

In a block of C tokens, with rows of Q, K, W and T = (I + stril(diag(beta) W W^T))^{-1} diag(beta), products of steps:

    H_C ... H_1 = I - W^T T W                   of the whole block
    q_i^T H_i ... H_1 = row i of Q - (tril(Q W^T) T) W        queries, back to the start of the block
    H_C ... H_{j+1} k_j = row j of K - (T stril(W K^T))^T W   keys, on to its end
    scores inside = tril(Q K^T) - tril(Q W^T) T stril(W K^T)

A block of queries then visits the earlier blocks, nearest first, and passes through the steps of each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from effattn_jax import checks
from effattn_jax.precision import accumulation_dtype, contract, zeros_varying
from effattn_jax.sparse.mask import same_document
from effattn_jax.typing import Array, Float, Int, SegmentIds

BLOCK = 64


class Steps(NamedTuple):
    """The steps of blocks of C tokens, and what they do to its own queries and keys."""

    inside: Float[Array, "... C C"]  # q_i^T (H_i ... H_{j+1}) k_j for j <= i; what is above is of no meaning
    back: Float[Array, "... C K"]  # queries at the start of the block
    on: Float[Array, "... C K"]  # keys at its end
    whole: Float[Array, "... K K"]


def block_steps(
    q: Float[Array, "... C K"], k: Float[Array, "... C K"], w: Float[Array, "... C K"], beta: Float[Array, "... C"]
) -> Steps:
    size = q.shape[-2]
    lower, strict = (jnp.tril(jnp.ones((size, size), bool), diagonal) for diagonal in (0, -1))
    overlap = jnp.where(strict, beta[..., None] * contract("...ik,...jk->...ij", w, w), 0)
    right = jnp.broadcast_to(jnp.eye(size, dtype=w.dtype), overlap.shape) * beta[..., None]
    solved = solve_triangular(jnp.eye(size, dtype=w.dtype) + overlap, right, lower=True, unit_diagonal=True)
    seen = contract("...ir,...rs->...is", jnp.where(lower, contract("...ik,...jk->...ij", q, w), 0), solved)
    met = jnp.where(strict, contract("...sk,...jk->...sj", w, k), 0)
    return Steps(
        inside=contract("...ik,...jk->...ij", q, k) - contract("...is,...sj->...ij", seen, met),
        back=q - contract("...is,...sk->...ik", seen, w),
        on=k - contract("...sj,...sk->...jk", contract("...rs,...sj->...rj", solved, met), w),
        whole=jnp.eye(w.shape[-1], dtype=w.dtype)
        - contract("...rk,...rl->...kl", w, contract("...rs,...sl->...rl", solved, w)),
    )


def path_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    w: Float[Array, "B T G K"],
    beta: Float[Array, "B T G"],
    *,
    log_forget: Float[Array, "B T H"] | None = None,
    scale: float | None = None,
    segment_ids: SegmentIds | None = None,
) -> Float[Array, "B T H V"]:
    """o_i = sum_{j <= i} softmax_j(scale * q_i^T H_i ... H_{j+1} k_j + f_{j+1} + ... + f_i) v_j.

    Args:
      q: [B, T, H, K] queries.
      k, v: [B, T, G, K], [B, T, G, V]; G divides H, each key head serves H / G consecutive query heads.
      w: [B, T, G, K] directions of the steps, of length one.
      beta: [B, T, G] in [0, 2]; 0 everywhere is softmax attention.
      log_forget: f [B, T, H] <= 0, logarithms of forget gates (Lin et al. 2025, arXiv:2503.02130); None is none.
      scale: factor on the scores; None means K**-0.5.
      segment_ids: [B, T] documents of packed rows; negative ids mark padding, which is not read and reads zero.

    Returns:
      out [B, T, H, V] in q's dtype. Memory is linear in T, forward and backward; work is that of causal attention and,
      for every pair of blocks of C tokens, one product [C, K] x [K, K] more.

    Raises:
      ValueError: shapes, dtypes, head counts or segment ids that do not fit.
    """
    check_path(q, k, v, w, beta, log_forget, segment_ids)
    batch, length, heads, key_dim = q.shape
    if q.size == 0:
        return jnp.zeros_like(q, shape=(batch, length, heads, v.shape[-1]))
    dtype, accumulate = q.dtype, accumulation_dtype(q.dtype)
    ids = jnp.zeros_like(q, shape=(batch, length), dtype=jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
    forget = jnp.zeros_like(q, shape=(batch, length, heads), dtype=accumulate) if log_forget is None else log_forget
    real = ids >= 0
    q, k, v, w = (jnp.where(real[..., None, None], x, 0).astype(accumulate) for x in (q, k, v, w))
    beta, forget = (jnp.where(real[..., None], x, 0).astype(accumulate) for x in (beta, forget))
    k, v, w, beta = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v, w, beta))
    scale = key_dim**-0.5 if scale is None else scale

    blocks = -(-length // BLOCK)
    size = -(-length // blocks)
    rows = [to_blocks(x, blocks, size) for x in (q * scale, k, v, w, beta, forget)]
    ids = to_blocks(jnp.where(real, ids, -1)[..., None], blocks, size, fill=-1)[..., 0, :]  # [N, B, C]
    out = _attend(rows, ids)
    out = jnp.moveaxis(jnp.moveaxis(out, 0, 1), 2, 3)  # [N, B, H, C, V] -> [B, N, C, H, V]
    return out.reshape(batch, blocks * size, heads, -1)[:, :length].astype(dtype)


def to_blocks(x: Float[Array, "B T H ..."], blocks: int, size: int, fill: float = 0) -> Float[Array, "N B H C ..."]:
    padded = [(0, 0), (0, blocks * size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    x = jnp.pad(x, padded, constant_values=fill).reshape(x.shape[0], blocks, size, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)


def _attend(rows: Sequence[Array], ids: Int[Array, "N B C"]) -> Array:
    """Blocks of queries one after the other, each recomputed in the backward pass."""
    q, k, v, w, beta, forget = rows
    steps = block_steps(q, k, w, beta)
    kept = jnp.cumsum(forget, -1)  # F_i from the start of the block
    left = jnp.flip(jnp.cumsum(jnp.flip(forget, -1), -1), -1) - forget  # F_C - F_j
    causal = jnp.tril(jnp.ones((q.shape[-2],) * 2, bool))

    @jax.checkpoint
    def queries(index: Array) -> Array:
        inside, back, kept_here, own = (x[index] for x in (steps.inside, steps.back, kept, ids))
        exponent = inside + jnp.where(causal, kept_here[..., :, None] - kept_here[..., None, :], 0)
        mask = causal & same_document(own[:, :, None], own[:, None, :])
        first = softmax_part(jnp.where(mask[:, None], exponent, -jnp.inf), v[index])

        def visit(carry: tuple[Array, Array, Part], earlier: Array) -> tuple[tuple[Array, Array, Part], None]:
            def read(carry: tuple[Array, Array, Part]) -> tuple[Array, Array, Part]:
                back, gap, part = carry
                scores = contract("bhik,bhjk->bhij", back, steps.on[earlier])
                scores += (kept_here + gap)[..., :, None] + left[earlier][..., None, :]
                mask = same_document(own[:, :, None], ids[earlier][:, None, :])
                part = merge(part, softmax_part(jnp.where(mask[:, None], scores, -jnp.inf), v[earlier]))
                back = contract("bhik,bhkl->bhil", back, steps.whole[earlier])
                return back, gap + kept[earlier][..., -1:], part

            return jax.lax.cond(earlier < index, read, lambda carry: carry, carry), None

        gap = zeros_varying((*kept_here.shape[:-1], 1), kept_here.dtype, back)
        (_, _, part), _ = jax.lax.scan(visit, (back, gap, first), jnp.arange(len(q)), reverse=True)
        return part.weighted / jnp.where(part.total == 0, 1, part.total)[..., None]

    return jax.lax.map(queries, jnp.arange(len(q)))


class Part(NamedTuple):
    """A softmax over some of the keys: m = max s, sum e^{s - m}, sum e^{s - m} v."""

    top: Float[Array, "... C"]
    total: Float[Array, "... C"]
    weighted: Float[Array, "... C V"]


def softmax_part(scores: Float[Array, "... C M"], v: Float[Array, "... M V"]) -> Part:
    """Masked scores are -inf; a row may have no key at all."""
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    top = jnp.maximum(top, jnp.finfo(scores.dtype).min / 2)
    p = jnp.exp(scores - top[..., None])
    return Part(top, jnp.sum(p, axis=-1), contract("...ij,...jv->...iv", p, v))


def merge(a: Part, b: Part) -> Part:
    top = jnp.maximum(a.top, b.top)
    x, y = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return Part(top, x * a.total + y * b.total, x[..., None] * a.weighted + y[..., None] * b.weighted)


def check_path(
    q: Array, k: Array, v: Array, w: Array, beta: Array, log_forget: Array | None, segment_ids: SegmentIds | None
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("w", w)):
        checks.check_rank(name, x, 4, "[B, T, H, K]")
        checks.check_floating(name, x)
    batch, length, heads, key_dim = q.shape
    groups = k.shape[2]
    checks.check_head_groups("k", groups, "q", heads)
    checks.check_shape("k", k, (batch, length, groups, key_dim), "[B, T, G, K]")
    checks.check_shape("v", v, (batch, length, groups, None), "[B, T, G, V]")
    checks.check_shape("w", w, (batch, length, groups, key_dim), "[B, T, G, K]")
    checks.check_shape("beta", beta, (batch, length, groups), "[B, T, G]")
    if log_forget is not None:
        checks.check_shape("log_forget", log_forget, (batch, length, heads), "[B, T, H]")
    checks.check_segment_ids(segment_ids, batch, length)
