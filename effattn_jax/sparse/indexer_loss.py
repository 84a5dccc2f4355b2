"""What trains the indexer of `dsa`: its scores shall be distributed as the attention is."""

import jax
import jax.numpy as jnp

from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.sparse.compressed import weights, window_logits
from effattn_jax.sparse.documents import first_tokens, real_only
from effattn_jax.sparse.dsa import check_indexer, dsa_tokens, index_scores, readable
from effattn_jax.sparse.query_chunks import over_queries
from effattn_jax.typing import Array, Bool, Float, Int, Queries


def indexer_loss(
    q: Queries,
    k: Float[Array, "B M G K"],
    index_q: Float[Array, "B T J I"],
    index_k: Float[Array, "B M I"],
    index_weights: Float[Array, "B T J"],
    *,
    topk: int | None = None,
    segment_ids: Int[Array, "B M"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T"]:
    """KL(p_t || softmax(I_t)) of each query, p_t the mean of the attention's weights over the heads.

    DeepSeek-V3.2: DeepSeek-AI 2025, arXiv:2512.02556. topk = None is the warm-up: over all tokens s <= t, with the rest
    of the model frozen. topk = n is the sparse stage: weights and scores over the n tokens that `dsa` reads. The
    gradient in I_t is softmax(I_t) - p_t.

    The target has no gradient: q and k are detached here. Detach what the indexer's projections read as well, so that
    this loss trains the indexer alone: `index_q`, `index_k` and `index_weights` of `jax.lax.stop_gradient(x)`.

    Args: as of `dsa`.

    Returns:
      [B, T] in float32 (float64 for float64 inputs), 0 for padding; the mean is up to the caller. Memory is linear in T
      and M.

    Raises:
      ValueError: shapes, dtypes, head counts or sizes that do not fit.
    """
    check_qkv(q, k, k)
    check_numbers(scale, None)
    check_indexer(q, k, index_q, index_k, index_weights, topk, segment_ids)
    (batch, length, heads, key_dim), keys = q.shape, k.shape[1]
    factor = key_dim**-0.5 if scale is None else float(scale)
    q, k = jax.lax.stop_gradient((q, k))
    position = jnp.arange(keys - length, keys)[None]
    tokens = None
    if topk is not None:
        tokens = dsa_tokens(index_q, index_k, index_weights, topk=topk, segment_ids=segment_ids)
    own = None
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        own = segment_ids[:, keys - length :]
        q, index_q, index_weights = (real_only(x, own) for x in (q, index_q, index_weights))
        k, index_k = (real_only(x, segment_ids) for x in (k, index_k))
        if tokens is not None:
            first = first_tokens(segment_ids)[:, keys - length :, None]
            tokens = jnp.where(tokens < 0, -1, tokens + first)

    def of_all(q: Array, index_q: Array, index_weights: Array, position: Array, own: Array | None) -> Array:
        seen = jnp.broadcast_to(readable(position, own, segment_ids, keys), (batch, q.shape[1], keys))
        p = weights(window_logits(q, k, seen, factor))
        return divergence(jnp.mean(p, axis=(2, 3)), index_scores(index_q, index_k, index_weights), seen)

    def of_some(q: Array, index_q: Array, index_weights: Array, tokens: Array) -> Array:
        seen = tokens >= 0
        take = jax.vmap(lambda row, which: row[which])
        which = jnp.maximum(tokens, 0)
        near, index_near = take(k, which), take(index_k, which)

        def of_query(q: Array, k: Array, seen: Array) -> Array:
            return weights(window_logits(q[:, None], k, seen[:, None], factor))[:, 0]

        p = jax.vmap(of_query, in_axes=1, out_axes=1)(q, near, seen)
        scores = jnp.maximum(contract("bcji,bcni->bcjn", index_q, index_near), 0)
        scores = contract("bcjn,bcj->bcn", scores, index_weights.astype(accumulation_dtype(scores.dtype)))
        return divergence(jnp.mean(p, axis=(2, 3)), scores, seen)

    rows = (q, index_q, index_weights)
    if tokens is None:
        return over_queries(of_all, batch * (heads + index_q.shape[2]) * keys, *rows, position, own)
    gathered = k.shape[2] * key_dim + index_k.shape[2] + heads + index_q.shape[2]
    return over_queries(of_some, batch * tokens.shape[2] * gathered, *rows, tokens)


def divergence(
    p: Float[Array, "B C n"], scores: Float[Array, "B C n"], seen: Bool[Array, "B C n"]
) -> Float[Array, "B C"]:
    """KL(p || softmax(scores)) over what is seen; 0 of nothing."""
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    shifted = jnp.where(seen, scores - jnp.where(jnp.isneginf(top), 0, top), 0)
    total = jnp.sum(jnp.where(seen, jnp.exp(shifted), 0), axis=-1)
    entropy = jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), axis=-1)
    cross = jnp.sum(p * shifted, axis=-1) - jnp.log(jnp.where(total == 0, 1, total))
    return entropy - cross
