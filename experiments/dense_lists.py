"""Block attention as whole products under the mask of its lists, for rows of some thousands of tokens.

`block_attention` gathers the spans of every list, a few rows at a time: work and memory of what is listed alone, in
many small steps. Where lists name a quarter of a short row, an accelerator may make all products in less time.
"""

import functools
import operator

import jax
import jax.numpy as jnp

from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.sparse.block_attention import IMPLEMENTATIONS
from effattn_jax.sparse.mask import same_document
from effattn_jax.sparse.spans import Keys, Plan, Rows
from effattn_jax.typing import Array

NAME = "dense"
LOGITS = 2**27  # in flight


def dense_lists(plan: Plan, rows: Rows, keys: Keys) -> tuple[Array, Array]:
    """Out [E, X, Y, V] and log-sum-exp [E, X, Y], as of `span_attention`; every logit is made, some rows at a time.

    Raises:
      NotImplementedError: for masks beside the lists and for capped logits.
    """
    if keys.readable is not None or keys.mask is not None or plan.logits_soft_cap is not None:
        raise NotImplementedError("a mask beside the lists, or capped logits")
    pairs, count, queries = rows.position.shape
    length = keys.k.shape[1]
    size = max(1, min(count, LOGITS // (pairs * queries * length)))
    chunks = -(-count // size)
    accumulate = accumulation_dtype(rows.q.dtype)
    k, v = (x.astype(accumulate) for x in (keys.k, keys.v))  # gradients of all chunks add up in this dtype

    def of_chunk(some: Rows) -> tuple[Array, Array]:
        return _attend(plan, some, keys._replace(k=k.astype(keys.k.dtype), v=v.astype(keys.v.dtype)))

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, chunks * size - count), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(pairs, chunks, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(pairs, chunks * size, *x.shape[3:])[:, :count]

    out, lse = jax.lax.map(jax.checkpoint(of_chunk, prevent_cse=False), jax.tree.map(split, rows))
    return join(out), join(lse)


def _attend(plan: Plan, rows: Rows, keys: Keys) -> tuple[Array, Array]:
    other = jnp.arange(keys.k.shape[1])
    starts = jnp.moveaxis(rows.starts, 2, 0)[..., None]
    listed = functools.reduce(operator.or_, [(other >= start) & (other < start + plan.width) for start in starts])
    allowed = listed[:, :, None]
    if plan.causal:
        allowed = allowed & (other <= rows.position[..., None])
    if rows.segments is not None and keys.segments is not None:
        allowed = allowed & same_document(rows.segments[..., None], keys.segments[:, None, None])
    s = jnp.where(allowed, plan.scale * contract("exyk,ejk->exyj", rows.q, keys.k), -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0, top)
    p = jnp.where(allowed, jnp.exp(s - top), 0)
    total = jnp.sum(p, axis=-1)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = contract("exyj,ejv->exyv", p.astype(keys.v.dtype), keys.v) / total[..., None]
    return out.astype(rows.q.dtype), jnp.where(empty, -jnp.inf, top[..., 0] + jnp.log(total))


IMPLEMENTATIONS[NAME] = dense_lists
