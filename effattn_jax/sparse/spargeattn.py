"""SpargeAttn: blocks of like tokens stand for themselves by their means; all others are read."""

import math

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.precision import accumulation_dtype
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.block_masks import block_causal, block_means, block_products, first_block, lists_of, ranks
from effattn_jax.sparse.kv_buffer import check_sizes
from effattn_jax.typing import Array, Float, Int, Queries


def spargeattn(
    q: Queries,
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    *,
    query_block: int = 128,
    block_size: int = 64,
    topk: float | None = 0.5,
    mass: float | None = None,
    similarity: float = -0.1,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T H V"]:
    """Causal softmax attention of a prompt over the blocks of `spargeattn_blocks`.

    SpargeAttn: Zhang et al. 2025, arXiv:2502.18137. Its first stage, the choice of blocks, and exact attention to them:
    neither its second stage, which leaves out products with values while it reads, nor its 8-bit products. Not for
    training: means see the future within a block. Decoding after it reads everything.

    Args:
      q: [B, T, H, K] queries, the last T of the M positions; M - T is a multiple of the query block. Keys and queries
        are rotated before, where they are.
      k, v: [B, M, G, K] keys and [B, M, G, V] values; G divides H.
      query_block, block_size: tokens of a block of queries, and of keys.
      topk: the part of all blocks of keys, those after the query too, that a block of queries reads.
      mass: instead (topk=None), the part of its weights over means that the blocks hold together.
      similarity: blocks whose tokens have a mean cosine below it are not stood for by their mean; above 1 all are read.
      scale: factor on the logits; None means K**-0.5.
      implementation: see `block_attention`.

    Returns:
      [B, T, H, V] in q's dtype. Every head chooses by itself, in float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes, dtypes, head counts, sizes or parts that do not fit.
    """
    check_qkv(q, k, v)
    lists = spargeattn_blocks(
        q,
        k,
        query_block=query_block,
        block_size=block_size,
        topk=topk,
        mass=mass,
        similarity=similarity,
        scale=scale,
    )
    return block_attention(
        q, k, v, lists, block_size=block_size, query_block=query_block, scale=scale, implementation=implementation
    )[0]


def spargeattn_blocks(
    q: Queries,
    k: Float[Array, "B M G K"],
    *,
    query_block: int = 128,
    block_size: int = 64,
    topk: float | None = 0.5,
    mass: float | None = None,
    similarity: float = -0.1,
    scale: float | None = None,
) -> Int[Array, "B N H n"]:
    """The blocks of keys that each block of queries reads, ascending, -1 behind the last.

    P_i = softmax_j(scale * mean_q_i . mean_k_j) over the blocks of keys up to the block of queries whose tokens are
    alike. A block of queries reads the greatest of P, ceil(topk n) of all n blocks, or as few as hold `mass` together;
    the blocks of keys that are not alike; and the blocks that its own positions are in, so that no query reads nothing
    (the published code does not force them). A block of queries that are not alike reads all.

    Tokens are alike if the mean of their cosines, each with each and itself, is at least `similarity`; of keys, after
    the mean of all keys was taken off, which changes no softmax.
    """
    check_numbers(scale, None)
    check_sizes(query_block=query_block, block_size=block_size)
    if (topk is None) == (mass is None):
        checks.fail("topk", f"{topk} and a mass of {mass}", "one of the two")
    for name, part in (("topk", topk), ("mass", mass)):
        if part is not None and not part > 0:
            checks.fail(name, part, "a number above 0")
    length, keys, key_dim = q.shape[1], k.shape[1], q.shape[3]
    first_block(length, keys, query_block)
    q, k = (x.astype(accumulation_dtype(x.dtype)) for x in jax.lax.stop_gradient((q, k)))
    k = k - jnp.mean(k, axis=1, keepdims=True)
    heads = q.shape[2] // k.shape[2]
    like_q = jnp.moveaxis(self_similarity(q, query_block) >= similarity, 1, 2)[..., None]  # B, H, N, 1
    like_k = jnp.repeat(jnp.moveaxis(self_similarity(k, block_size) >= similarity, 1, 2), heads, axis=1)[:, :, None]
    causal = block_causal(length, keys, query_block, block_size)

    s = block_products(block_means(q, query_block), block_means(k, block_size))
    s = s * (key_dim**-0.5 if scale is None else float(scale))
    there = causal & like_k
    p = jnp.where(there, jax.nn.softmax(jnp.where(there, s, jnp.finfo(s.dtype).min), axis=-1), 0)
    if mass is None:
        chosen = ranks(p) < math.ceil((topk or 0) * p.shape[-1])
    else:
        order = jnp.argsort(-p, axis=-1, stable=True)
        until = jnp.cumsum(jnp.take_along_axis(p, order, axis=-1), axis=-1)
        before = jnp.pad(until[..., :-1], ((0, 0), (0, 0), (0, 0), (1, 0)))
        chosen = jnp.take_along_axis(before < mass, jnp.argsort(order, axis=-1), axis=-1)

    begin = keys - length + query_block * jnp.arange(p.shape[2])
    own = block_size * (jnp.arange(p.shape[3]) + 1) > begin[:, None]  # and up to its last query, being causal
    return lists_of((chosen | ~like_k | ~like_q | own) & causal)


def self_similarity(x: Float[Array, "B T H K"], block_size: int) -> Float[Array, "B N H"]:
    """The mean cosine of the tokens of a block, |mean_i x_i / |x_i||^2. A zero is like nothing, not even itself."""
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.sum(jnp.square(block_means(x / jnp.where(norm == 0, 1, norm), block_size)), axis=-1)
