"""FlexPrefill: each head of a prompt reads as many blocks as its weights need, by columns and diagonals or by means."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.precision import accumulation_dtype
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.sparse.attention import attention
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.block_masks import block_causal, block_means, block_products, first_block, lists_of, ranks
from effattn_jax.sparse.kv_buffer import check_sizes
from effattn_jax.sparse.last_weights import diagonal_sums, last_weights
from effattn_jax.typing import Array, Bool, Float, Int, Queries


def flexprefill(
    q: Queries,
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    *,
    block_size: int = 128,
    gamma: float = 0.9,
    tau: float = 0.1,
    min_budget: int = 1024,
    max_budget: int | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T H V"]:
    """Causal softmax attention of a prompt over the blocks of `flexprefill_blocks`.

    FlexPrefill: Lai et al. 2025, arXiv:2502.20766. Not for training: what an early query reads depends on the last
    ones. Decoding after it reads everything. A row of at most max(2 blocks, min_budget in whole blocks) tokens reads
    everything.

    Args:
      q: [B, T, H, K] queries, the last T of the M positions; M - T is a multiple of the block. Keys and queries are
        rotated before, where they are.
      k, v: [B, M, G, K] keys and [B, M, G, V] values; G divides H.
      block_size: b, tokens of a block of queries, and of keys.
      gamma: the part of the weights that the chosen columns, diagonals or blocks hold together; above 1 all are read.
      tau: heads whose block means predict the weights at a distance below tau choose by them; 0: none.
      min_budget, max_budget: tokens of the columns and of the diagonals of a head, at least and at most.
      scale: factor on the logits; None means K**-0.5.
      implementation: see `block_attention`.

    Returns:
      [B, T, H, V] in q's dtype. Every head chooses by itself, in float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes, dtypes, head counts or sizes that do not fit.
    """
    check_qkv(q, k, v)
    check_numbers(scale, None)
    sizes = {"block_size": block_size, "min_budget": min_budget, "max_budget": max_budget or 1}
    check_sizes(**sizes)
    first_block(q.shape[1], k.shape[1], block_size)
    if k.shape[1] <= max(2, -(-min_budget // block_size)) * block_size:
        return attention(q, k, v, scale=scale)
    lists = flexprefill_blocks(
        q,
        k,
        block_size=block_size,
        gamma=gamma,
        tau=tau,
        min_budget=min_budget,
        max_budget=max_budget,
        scale=scale,
    )
    return block_attention(
        q, k, v, lists, block_size=block_size, query_block=block_size, scale=scale, implementation=implementation
    )[0]


def flexprefill_blocks(
    q: Queries,
    k: Float[Array, "B M G K"],
    *,
    block_size: int = 128,
    gamma: float = 0.9,
    tau: float = 0.1,
    min_budget: int = 1024,
    max_budget: int | None = None,
    scale: float | None = None,
) -> Int[Array, "B N H n"]:
    """The blocks of keys that each block of queries reads, ascending, -1 behind the last.

    A head reads whole columns of blocks and whole diagonals of blocks. The weights of the last b queries give columns
    and diagonals their mass; those of the greatest mass are taken, as many blocks as the tokens that hold `gamma` of it
    would fill, among them the first column and the main diagonal. A diagonal of blocks D back is (i, i - D) alone,
    though its tokens reach into (i, i - D - 1), too.

    Where mean_q . mean_k predicts the mass of the columns within `tau` (`distance`), the head takes `min_budget` of
    columns and diagonals instead, and the greatest of softmax_j(scale * mean_q_i . mean_k_j) over all N blocks i and
    all j whose sum is at most gamma N.
    """
    for name, value in (("gamma", gamma), ("tau", tau)):
        if isinstance(value, jax.Array) or not value >= 0:
            checks.fail(name, value, "a Python number of at least 0")
    q, k = jax.lax.stop_gradient((q, k))
    length, keys = q.shape[1], k.shape[1]
    before, blocks = first_block(length, keys, block_size), -(-keys // block_size)
    marginals = last_marginals(q, k, block_size, scale)
    least = min(-(-min_budget // block_size), blocks)
    most = blocks if max_budget is None else max(least, min(max_budget // block_size, blocks))
    own = before + jnp.arange(-(-length // block_size))

    def lines(columns: Int[Array, "*h"], diagonals: Int[Array, "*h"]) -> Bool[Array, "B H N n"]:
        """That many blocks of columns and of diagonals."""
        column = jnp.where(jnp.arange(blocks) == 0, jnp.inf, block_sums(marginals.column, block_size))
        # bins count from position M - 1 - D = 0, so that the last one is the main diagonal
        bins = block_sums(jnp.flip(marginals.diagonal, axis=-1), block_size)
        diagonal = jnp.where(jnp.arange(blocks) == blocks - 1, jnp.inf, bins)
        on_column = ranks(column) < columns[..., None]
        on_diagonal = jnp.flip(ranks(diagonal) < diagonals[..., None], axis=-1)  # by blocks back from the own one
        distance = own[:, None] - jnp.arange(blocks)
        return on_column[:, :, None] | on_diagonal[:, :, jnp.maximum(distance, 0)]

    needed = [jnp.clip(blocks_of(x, gamma, block_size), least, most) for x in marginals]
    causal = block_causal(length, keys, block_size, block_size)
    mask = lines(*needed)
    if tau > 0:
        means = block_means(k, block_size)
        by_means = distance(mean_weights(q, means, block_size, scale), marginals.column, block_size) < tau
        p = scaled(block_products(block_means(q, block_size), means), q, scale)
        p = jax.nn.softmax(jnp.where(causal, p, -jnp.inf), axis=-1)
        least_of_all = jnp.full(p.shape[:2], least)
        other = lines(least_of_all, least_of_all) | greatest(p, gamma * p.shape[2])
        mask = jnp.where(by_means[..., None, None], other, mask)
    return lists_of(mask & causal)


class Marginals(NamedTuple):
    """Means over the last b queries of their weights, along a column and along a diagonal; each sums to 1."""

    column: Float[Array, "B H M"]
    diagonal: Float[Array, "B H M"]  # by distance D


def last_marginals(q: Queries, k: Float[Array, "B M G K"], block_size: int, scale: float | None = None) -> Marginals:
    weights = last_weights(q, k, block_size, scale)
    return Marginals(jnp.mean(weights, axis=2), diagonal_sums(weights) / weights.shape[2])


def blocks_of(mass: Float[Array, "B H M"], gamma: float, block_size: int) -> Int[Array, "B H"]:
    """The blocks that the tokens with the greatest masses, in all at most gamma, would fill, and one more."""
    tokens = jnp.sum(jnp.cumsum(-jnp.sort(-mass, axis=-1), axis=-1) <= gamma, axis=-1)
    return (tokens + 1) // block_size + 1


def block_sums(x: Float[Array, "B H M"], block_size: int) -> Float[Array, "B H n"]:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block_size)))
    return jnp.sum(x.reshape(*x.shape[:2], -1, block_size), axis=-1)


def scaled(products: Array, q: Array, scale: float | None) -> Array:
    return products * (q.shape[-1] ** -0.5 if scale is None else float(scale))


def mean_weights(
    q: Queries, key_means: Float[Array, "B n G K"], block_size: int, scale: float | None = None
) -> Float[Array, "B H n"]:
    """softmax_j of the product of the mean of the last b queries with the mean of the keys of block j."""
    last = q[:, max(0, q.shape[1] - block_size) :].astype(accumulation_dtype(q.dtype))
    products = block_products(jnp.mean(last, axis=1, keepdims=True), key_means)
    return jax.nn.softmax(scaled(products, q, scale)[:, :, 0], axis=-1)


def distance(a: Float[Array, "B H n"], column: Float[Array, "B H M"], block_size: int) -> Float[Array, "B H"]:
    """The square root of the Jensen-Shannon divergence of a and the columns' mass v in blocks, in nats:

        sqrt(KL(a || m) / 2 + KL(v || m) / 2),  m = (a + v) / 2,

    infinite where one of the numbers is 0, as if 0 ln 0 were no number."""
    v = block_sums(column, block_size)
    m = (a + v) / 2
    some = jnp.all((a > 0) & (v > 0), axis=-1)
    kl = lambda x: jnp.sum(jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x / m, 1)), 0), axis=-1)  # noqa: E731
    return jnp.where(some, jnp.sqrt(jnp.maximum(kl(a) + kl(v), 0) / 2), jnp.inf)


def greatest(p: Float[Array, "B H N n"], mass: float) -> Bool[Array, "B H N n"]:
    """The greatest of all N n entries whose sum is at most `mass`."""
    flat = p.reshape(*p.shape[:2], -1)
    count = jnp.sum(jnp.cumsum(-jnp.sort(-flat, axis=-1), axis=-1) <= mass, axis=-1)
    return (ranks(flat) < count[..., None]).reshape(p.shape)
