"""DeepSeek sparse attention: a light indexer scores every token of the past, and all heads read the best of them."""

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.documents import first_tokens, real_only
from effattn_jax.sparse.mask import same_document
from effattn_jax.sparse.query_chunks import over_queries
from effattn_jax.sparse.top import top_entries
from effattn_jax.typing import Array, Bool, Float, Int, Queries


def dsa(
    q: Queries,
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    index_q: Float[Array, "B T J I"],
    index_k: Float[Array, "B M I"],
    index_weights: Float[Array, "B T J"],
    *,
    topk: int = 2048,
    segment_ids: Int[Array, "B M"] | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T H V"]:
    """Softmax attention over the topk tokens s <= t with the highest index scores

        I_ts = sum_j w_tj ReLU(q^I_tj . k^I_s).

    DeepSeek-V3.2: DeepSeek-AI 2025, arXiv:2512.02556. The heads share the tokens. There is no gradient through the
    choice: the indexer learns by `indexer_loss`. Cost O(T M J I + T topk), memory linear in T and M.

    Args:
      q: [B, T, H, K] queries, the last T of the M positions.
      k, v: [B, M, G, K] keys and [B, M, G, V] values; G divides H. Latent attention has G = 1.
      index_q, index_k: queries of J heads and the one key of the indexer, rotated. The rotation is split-half, though
        the attention's may be interleaved.
      index_weights: w, with any constant factor in it (J**-0.5 I**-0.5 in the paper's model). May be negative.
      topk: tokens of a query; early queries have fewer.
      segment_ids: [B, M] documents of packed rows; negative ids are padding.
      scale: factor on the logits of the attention; None means K**-0.5.
      implementation: see `block_attention`.

    Returns:
      [B, T, H, V] in q's dtype. Of equal scores (zeros are common) the earlier token is taken.

    Raises:
      ValueError: shapes, dtypes, head counts or sizes that do not fit.
    """
    check_qkv(q, k, v)
    check_numbers(scale, None)
    check_indexer(q, k, index_q, index_k, index_weights, topk, segment_ids)
    tokens = dsa_tokens(index_q, index_k, index_weights, topk=topk, segment_ids=segment_ids)
    lists = jnp.broadcast_to(tokens[:, :, None], (*tokens.shape[:2], k.shape[2], tokens.shape[2]))
    return block_attention(
        q, k, v, lists, block_size=1, segment_ids=segment_ids, scale=scale, implementation=implementation
    )[0]


def dsa_tokens(
    index_q: Float[Array, "B T J I"],
    index_k: Float[Array, "B M I"],
    index_weights: Float[Array, "B T J"],
    *,
    topk: int = 2048,
    segment_ids: Int[Array, "B M"] | None = None,
) -> Int[Array, "B T n"]:
    """The n = min(topk, M) tokens that `dsa` reads, counted from the document's first, the highest score first; -1
    where there are no more. Has no gradient."""
    length, keys = index_q.shape[1], index_k.shape[1]
    index_q, index_k, index_weights = jax.lax.stop_gradient((index_q, index_k, index_weights))
    first = jnp.zeros((1, length), jnp.int32)
    position = jnp.arange(keys - length, keys)[None]
    own = None
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        own = segment_ids[:, keys - length :]
        index_q, index_weights = real_only(index_q, own), real_only(index_weights, own)
        index_k = real_only(index_k, segment_ids)
        first = first_tokens(segment_ids)[:, keys - length :]

    def of_chunk(q: Array, weights: Array, position: Array, first: Array, own: Array | None) -> Int[Array, "B C n"]:
        may_read = readable(position, own, segment_ids, keys)
        scores = jnp.where(may_read, index_scores(q, index_k, weights), -jnp.inf)
        picks = top_entries(scores, min(topk, keys))
        return jnp.where(picks < 0, -1, picks - first[..., None])

    numbers = index_q.shape[0] * index_q.shape[2] * keys
    return over_queries(of_chunk, numbers, index_q, index_weights, position, first, own)


def index_scores(
    q: Float[Array, "B C J I"], k: Float[Array, "B M I"], weights: Float[Array, "B C J"]
) -> Float[Array, "B C M"]:
    """I = sum_j w_j ReLU(q_j . k) in float32 at least."""
    s = jnp.maximum(contract("bcji,bmi->bcjm", q, k), 0)
    return contract("bcjm,bcj->bcm", s, weights.astype(accumulation_dtype(s.dtype)))


def readable(
    position: Int[Array, "#B C"], own: Int[Array, "B C"] | None, segment_ids: Int[Array, "B M"] | None, keys: int
) -> Bool[Array, "#B C M"]:
    """Tokens of the query's document up to it; none for padding."""
    mask = jnp.arange(keys) <= position[..., None]
    if own is not None and segment_ids is not None:
        mask &= same_document(own[:, :, None], segment_ids[:, None])
    return mask


def check_indexer(
    q: Array,
    k: Array,
    index_q: Array,
    index_k: Array,
    index_weights: Array,
    topk: int | None,
    segment_ids: Array | None,
) -> None:
    (batch, length), keys = q.shape[:2], k.shape[1]
    checks.check_shape("index_q", index_q, (batch, length, None, None), "[B, T, J, I]")
    checks.check_shape("index_k", index_k, (batch, keys, index_q.shape[3]), "[B, M, I]")
    checks.check_shape("index_weights", index_weights, index_q.shape[:3], "[B, T, J]")
    for name, x in (("index_q", index_q), ("index_k", index_k), ("index_weights", index_weights)):
        checks.check_floating(name, x)
    if topk is not None and (isinstance(topk, bool) or not isinstance(topk, int) or topk < 1):
        checks.fail("topk", topk, "an int of at least 1")
    if keys < length:
        checks.fail("k", f"{keys} tokens", f"at least the {length} of q, which are the last of them")
    checks.check_segment_ids(segment_ids, batch, keys)
