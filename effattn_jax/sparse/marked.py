"""Softmax attention whose rows list the spans of keys they read, as whole products under the mask of the lists.

`spans` gathers what is listed and makes nothing else, in many small steps; here all logits are made, in few large ones,
which may take less time where lists name a fair part of a row of some thousands of tokens. Memory is linear in T, work
quadratic.
"""

import functools

import jax
import jax.numpy as jnp

from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.sparse.spans import EACH, Keys, Plan, Rows, pairs_to_read
from effattn_jax.typing import Array, Bool, Float, Int

LOGITS = 2**27  # in flight


def marked_attention(plan: Plan, rows: Rows, keys: Keys) -> tuple[Float[Array, "E X Y V"], Float[Array, "E X Y"]]:
    """As `span_attention`; every logit is made, some rows at a time."""
    pairs, count, queries = rows.position.shape
    length = keys.k.shape[1]
    size = max(1, min(count, LOGITS // (pairs * queries * length)))
    chunks = -(-count // size)
    accumulate = accumulation_dtype(rows.q.dtype)
    k, v = (x.astype(accumulate) for x in (keys.k, keys.v))  # gradients of all chunks add up in this dtype

    def of_chunk(some: tuple[Int[Array, " C"], Rows]) -> tuple[Array, Array]:
        return _attend(plan, *some, keys._replace(k=k.astype(keys.k.dtype), v=v.astype(keys.v.dtype)))

    def split(x: Array, fill: int = 0) -> Array:
        tails = ((0, 0), (0, chunks * size - count), *((0, 0),) * (x.ndim - 2))
        x = jnp.pad(x, tails, constant_values=fill)
        return jnp.moveaxis(x.reshape(pairs, chunks, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(pairs, chunks * size, *x.shape[3:])[:, :count]

    which = jnp.arange(chunks * size).reshape(chunks, size)
    run = jax.checkpoint(of_chunk, prevent_cse=False)
    parts = jax.tree.map(split, rows)._replace(starts=split(rows.starts, length))
    out, lse = jax.lax.map(run, (which, parts))
    return join(out), join(lse)


def _attend(plan: Plan, which: Int[Array, " C"], rows: Rows, keys: Keys) -> tuple[Array, Array]:
    of_one = functools.partial(_allowed, plan, which)
    allowed = jax.vmap(of_one, in_axes=(0, EACH))(rows, keys)
    read = jnp.any(allowed, axis=(1, 2))[..., None]  # what is not may hold anything: 0 * NaN would reach the sums
    k, v = (jnp.where(read, x, 0) for x in (keys.k, keys.v))
    s = plan.scale * contract("exyk,ejk->exyj", rows.q, k)
    if plan.logits_soft_cap is not None:
        s = plan.logits_soft_cap * jnp.tanh(s / plan.logits_soft_cap)
    s = jnp.where(allowed, s, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0, top)
    p = jnp.where(allowed, jnp.exp(s - top), 0)
    total = jnp.sum(p, axis=-1)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = contract("exyj,ejv->exyv", p.astype(v.dtype), v) / total[..., None]
    return out.astype(rows.q.dtype), jnp.where(empty, -jnp.inf, top[..., 0] + jnp.log(total))


def _allowed(plan: Plan, which: Int[Array, " C"], rows: Rows, keys: Keys) -> Bool[Array, "C Y M"]:
    """Of one of E: what is on the list of a row, and may be read."""
    count, length = rows.starts.shape[0], keys.k.shape[0]
    marks = jnp.zeros((count, length), jnp.int32)
    marks = marks.at[jnp.arange(count)[:, None], rows.starts].set(1, mode="drop")  # starts are distinct
    begun = jnp.cumsum(marks, axis=1)
    ended = jnp.pad(begun, ((0, 0), (plan.width, 0)))[:, :length]
    position = jnp.broadcast_to(jnp.arange(length), (count, length))
    return pairs_to_read(plan, keys, rows, position, which, length) & (begun > ended)[:, None]
