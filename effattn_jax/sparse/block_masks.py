"""What selectors of blocks of queries and keys share: means, the causal past in blocks, and lists from masks."""

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.typing import Array, Bool, Float, Int


def block_means(x: Float[Array, "B T H K"], block_size: int) -> Float[Array, "B N H K"]:
    """Means over consecutive tokens, of the last block over as many as there are; in float32 at least, no gradients."""
    length = x.shape[1]
    blocks = -(-length // block_size)
    x = jax.lax.stop_gradient(x).astype(accumulation_dtype(x.dtype))
    x = jnp.pad(x, ((0, 0), (0, blocks * block_size - length), (0, 0), (0, 0)))
    count = jnp.minimum(length - block_size * jnp.arange(blocks), block_size)
    return jnp.sum(x.reshape(x.shape[0], blocks, block_size, *x.shape[2:]), axis=2) / count[:, None, None]


def first_block(length: int, keys: int, block_size: int) -> int:
    """The block of the first of the last `length` of `keys` positions, which must begin there."""
    if keys < length:
        checks.fail("k", f"{keys} tokens", f"at least the {length} of q, which are the last of them")
    if (keys - length) % block_size:
        checks.fail("k", f"{keys - length} tokens before q", f"a multiple of the block of {block_size}")
    return (keys - length) // block_size


def block_causal(length: int, keys: int, query_block: int, block_size: int) -> Bool[Array, "N n"]:
    """Blocks of keys that begin at the last query of a block or before; the queries are the last of the positions."""
    count = -(-length // query_block)
    last = jnp.minimum(keys - length + query_block * jnp.arange(1, count + 1), keys) - 1
    return block_size * jnp.arange(-(-keys // block_size)) <= last[:, None]


def lists_of(mask: Bool[Array, "B H N n"]) -> Int[Array, "B N H n"]:
    """The entries that are true, ascending, and -1 behind them."""
    size = mask.shape[-1]
    return jnp.moveaxis(ascending(jnp.where(mask, jnp.arange(size, dtype=jnp.int32), -1), size), 1, 2)


def ascending(lists: Int[Array, "*lists n"], size: int) -> Int[Array, "*lists n"]:
    """Entries below `size` in order, and -1 behind them."""
    lists = jnp.sort(jnp.where(lists < 0, size, lists), axis=-1)
    return jnp.where(lists < size, lists, -1)


def ranks(score: Float[Array, "*rows n"]) -> Int[Array, "*rows n"]:
    """0 for the highest; of equal ones the lowest index first."""
    return jnp.argsort(jnp.argsort(-score, axis=-1, stable=True), axis=-1)


def block_products(q: Float[Array, "B N H K"], k: Float[Array, "B n G K"]) -> Float[Array, "B H N n"]:
    """q_i . k_j of every head."""
    batch, count, heads, key_dim = q.shape
    products = contract("bxgrk,bngk->bgrxn", q.reshape(batch, count, k.shape[2], -1, key_dim), k)
    return products.reshape(batch, heads, count, k.shape[1])
