"""LongNet: dilated attention in segments of several lengths (Ding et al. 2023, arXiv:2307.02486).

A branch of segment length w and ratio r cuts a row into segments of w tokens; in a segment head h keeps the tokens
whose place is phi(h) modulo r, and attention is among those. Branches are joined by their log-sum-exps, which is one
softmax in which a key that several branches share with the query counts once in each.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.sparse.attention import attention
from effattn_jax.sparse.documents import first_tokens, real_only
from effattn_jax.sparse.masks import check_count
from effattn_jax.sparse.merge import merge
from effattn_jax.typing import Array, Float, Int, Queries

Part = tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]


def longnet_attention(
    q: Queries,
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    *,
    segments: Sequence[int] = (2048, 4096),
    ratios: Sequence[int] = (1, 2),
    causal: bool = True,
    head_offset: str = "contiguous",
    exact_grad: bool = True,
    segment_ids: Int[Array, "B M"] | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T H V"]:
    """o_i = sum_m e^{L_im} o_im / sum_m e^{L_im}; branch m: softmax attention of i over the tokens it meets there.

    The queries are the last of the keys' positions. Memory O(T + w), cost O(sum_m T w_m / r_m^2).

    Args:
      q: [B, T, H, K] queries.
      k, v: [B, M, G, K] keys and [B, M, G, V] values, M >= T; G divides H.
      segments: w_m, a length for each branch. A branch longer than the row is as long as the row.
      ratios: r_m. One must be 1: otherwise some tokens would be in no branch.
      causal: read the query's position and before only.
      head_offset: phi(h): "contiguous", floor(h / ceil(H / r)), as in the published code, or "modulo", h mod r, as in
        the paper.
      exact_grad: gradients of the function; False: of the function with the weights e^{L_im} / sum_m e^{L_im} of the
        branches held constant, as in the published code.
      segment_ids: [B, M] documents of packed rows, never decreasing along a row, whose segments are counted from
        their first token; negative ids mark padding, which is not read and returns 0. Cost O(sum_m M w_m / r_m).
      scale: factor on the logits; None means K**-0.5.
      implementation: see `attention`.

    Returns:
      out [B, T, H, V] in q's dtype.

    Raises:
      ValueError: shapes, dtypes, branches or offsets that do not fit.
    """
    check_qkv(q, k, v)
    check_numbers(scale, None)
    _check_branches(segments, ratios)
    checks.check_choice("head_offset", head_offset, ("contiguous", "modulo"))
    length, heads = q.shape[1:3]
    batch, keys = k.shape[:2]
    if keys < length:
        checks.fail("k", f"{keys} tokens", f"at least the {length} of q, which are the last of them")
    checks.check_segment_ids(segment_ids, batch, keys)
    if q.size == 0:
        return jnp.zeros_like(q, shape=(*q.shape[:3], v.shape[-1]))
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        q, k, v = (real_only(x, segment_ids[:, keys - x.shape[1] :]) for x in (q, k, v))
    options: dict[str, Any] = {"scale": scale, "implementation": implementation}
    parts = []
    for segment, ratio in zip(segments, ratios, strict=True):
        phases = _phases(heads, ratio, head_offset)
        if segment_ids is None:
            parts.append(_branch(q, k, v, min(segment, keys), ratio, phases, causal, options))
        else:
            parts.append(_packed_branch(q, k, v, segment_ids, min(segment, keys), ratio, phases, causal, options))
    outs, lses = zip(*parts, strict=True)
    return merge(outs, lses if exact_grad else [jax.lax.stop_gradient(lse) for lse in lses])[0]


def _check_branches(segments: Sequence[int], ratios: Sequence[int]) -> None:
    for name, values in (("segments", segments), ("ratios", ratios)):
        for value in values:
            check_count(name, value)
    if len(segments) != len(ratios):
        checks.fail("ratios", f"{len(ratios)} ratios", f"one for each of the {len(segments)} segments")
    if 1 not in ratios:
        checks.fail("ratios", tuple(ratios), "a branch of ratio 1, without which some tokens would be in no branch")


def _phases(heads: int, ratio: int, head_offset: str) -> np.ndarray:
    h = np.arange(heads)
    return h % ratio if head_offset == "modulo" else h // -(-heads // ratio)


def _branch(
    q: Array, k: Array, v: Array, segment: int, ratio: int, phases: np.ndarray, causal: bool, options: dict[str, Any]
) -> Part:
    """Segments, and heads where they keep other tokens, become rows."""
    (batch, length, heads, _), keys = q.shape, k.shape[1]
    begin = (keys - length) // segment * segment  # of the segment of the first query
    before = keys - length - begin
    count = -(-(keys - begin) // segment)
    kept = -(-segment // ratio)

    def to_rows(x: Float[Array, "B M G D"], missing: int) -> Float[Array, "E n G D"]:
        x = jnp.pad(x, ((0, 0), (missing, count * segment - missing - x.shape[1]), (0, 0), (0, 0)))
        x = x.reshape(batch * count, segment, *x.shape[2:])
        if ratio == 1:
            return x
        x = jnp.pad(x, ((0, 0), (0, kept * ratio - segment), (0, 0), (0, 0)))
        x = x.reshape(batch * count, kept, ratio, *x.shape[2:])
        x = x[:, :, phases, np.arange(heads) // (heads // x.shape[3])]  # [E, n, H, D]
        return jnp.moveaxis(x, 2, 1).reshape(batch * count * heads, kept, 1, -1)

    def from_rows(x: Float[Array, "E n H ..."], fill: float) -> Float[Array, "B T H ..."]:
        if ratio > 1:
            x = jnp.moveaxis(x.reshape(batch * count, heads, kept, *x.shape[3:]), 1, 2)
            apart = jnp.full_like(x, fill, shape=(batch * count, kept, ratio, *x.shape[2:]))
            x = apart.at[:, :, phases, np.arange(heads)].set(x)
            x = x.reshape(batch * count, kept * ratio, *x.shape[3:])[:, :segment]
        return x.reshape(batch, count * segment, *x.shape[2:])[:, before : before + length]

    # padding is behind all tokens: causal queries never meet it
    ids = None if causal else jnp.asarray(_real(count, segment, ratio, keys - begin, phases))
    if ids is not None:
        ids = jnp.broadcast_to(ids, (batch, *ids.shape)).reshape(-1, kept)
    rows = to_rows(q, before), to_rows(k[:, begin:], 0), to_rows(v[:, begin:], 0)
    out, lse = attention(*rows, causal=causal, segment_ids=ids, return_lse=True, **options)
    return from_rows(out, 0), from_rows(lse, -jnp.inf)


def _real(count: int, segment: int, ratio: int, keys: int, phases: np.ndarray) -> np.ndarray:
    """[count * H, n], or [count, n] where all heads keep all: 0 where there is a token, else -1."""
    phases = phases[:1] if ratio == 1 else phases
    place = np.arange(-(-segment // ratio)) * ratio + phases[:, None]
    start = np.arange(count)[:, None, None] * segment
    real = (place < segment) & (start + place < keys)
    return np.where(real, 0, -1).astype(np.int32).reshape(count * len(phases), -1)


def _packed_branch(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Int[Array, "B M"],
    segment: int,
    ratio: int,
    phases: np.ndarray,
    causal: bool,
    options: dict[str, Any],
) -> Part:
    """What a head keeps moves to the front of its row; there a segment has at most ceil(w / r) tokens side by side."""
    (batch, length, heads, _), keys = q.shape, k.shape[1]
    q = jnp.pad(q, ((0, 0), (keys - length, 0), (0, 0), (0, 0)))
    place = jnp.arange(keys) - first_tokens(segment_ids)
    begins = (place % segment == 0) & (segment_ids >= 0)
    number = jnp.where(segment_ids >= 0, jnp.cumsum(begins, axis=1), -1)[:, None]  # of a segment in its row
    phase = jnp.asarray(phases)[:, None]
    kept = (place % segment % ratio)[:, None] == phase  # [B, H, M]
    number = jnp.where(kept, number, -1)
    order = jnp.argsort(number < 0, axis=-1, stable=True)

    def to_rows(x: Float[Array, "B M G D"]) -> Float[Array, "BH M 1 D"]:
        x = jnp.moveaxis(jnp.repeat(x, heads // x.shape[2], axis=2), 2, 1)
        return jnp.take_along_axis(x, order[..., None], axis=2).reshape(batch * heads, keys, 1, -1)

    back = jnp.argsort(order, axis=-1)

    def from_rows(x: Float[Array, "BH M 1 ..."]) -> Float[Array, "B T H ..."]:
        x = x.reshape(batch, heads, keys, -1)
        x = jnp.moveaxis(jnp.take_along_axis(x, back[..., None], axis=2), 1, 2)
        return x[:, keys - length :]

    ids = jnp.take_along_axis(number, order, axis=-1).reshape(batch * heads, keys)
    window = -(-segment // ratio)
    out, lse = attention(
        *map(to_rows, (q, k, v)), causal=causal, window=window, segment_ids=ids, return_lse=True, **options
    )
    return from_rows(out), from_rows(lse)[..., 0]
