"""Softmax attention whose rows list the blocks of keys they read, as whole products under the mask of the lists.

`spans` gathers what is listed and makes nothing else, in many small steps; here all logits are made, in few large ones,
which may take less time where lists name a fair part of a row of some thousands of tokens. Memory is linear in T, work
quadratic. With L the log-sum-exp, and p = e^{s - L} where a key is read, else 0:

    o_i = sum_j p_ij v_j    ds_ij = p_ij (do_i . v_j - do_i . o_i + dL_i)
    dq_i = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i    dv_j = sum_i p_ij do_i

The backward pass makes the logits of some rows again, and multiplies numbers of the inputs' dtype.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.precision import accumulation_dtype, contract, zeros_varying
from effattn_jax.sparse.documents import first_tokens
from effattn_jax.sparse.spans import EACH, Keys, Plan, Rows, pairs_to_read
from effattn_jax.typing import Array, Bool, Float, Int

LOGITS = 2**27  # in flight


class Some(NamedTuple):
    """Some of the X rows, of all E."""

    which: Int[Array, " C"]
    rows: Rows
    listed: Bool[Array, "E C N"]  # blocks by number, from the first token of a document where there are documents
    upstream: Any = None  # gradients of the output, log-sum-exp, and do . o - dL


def marked_attention(plan: Plan, rows: Rows, keys: Keys) -> tuple[Float[Array, "E X Y V"], Float[Array, "E X Y"]]:
    """As `span_attention`, of spans that are the blocks of a row or of its documents; every logit is made, some rows at
    a time."""
    zero = zeros_varying((), jnp.float32, *jax.tree.leaves((rows, keys)))
    q, k, v = (x + zero.astype(x.dtype) for x in (rows.q, keys.k, keys.v))
    return _marked(plan, rows._replace(q=q), keys._replace(k=k, v=v))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _marked(plan: Plan, rows: Rows, keys: Keys) -> tuple[Array, Array]:
    of_keys = _numbers(plan, keys)

    def of_some(some: Some) -> tuple[Array, Array]:
        _, v, s = _logits(plan, some, keys, of_keys)
        top = jnp.max(s, axis=-1, keepdims=True)
        top = jnp.where(jnp.isneginf(top), 0, top)
        p = jnp.exp(s - top)
        total = jnp.sum(p, axis=-1)
        empty = total == 0
        total = jnp.where(empty, 1, total)
        out = contract("exyj,ejv->exyv", p.astype(v.dtype), v) / total[..., None]
        return out.astype(some.rows.q.dtype), jnp.where(empty, -jnp.inf, top[..., 0] + jnp.log(total))

    out, lse = jax.lax.map(of_some, _split(plan, rows, keys))
    return _join(out, rows), _join(lse, rows)


def _keep_arguments(plan: Plan, rows: Rows, keys: Keys) -> Any:
    out, lse = _marked(plan, rows, keys)
    return (out, lse), (rows, keys, out, lse)


def _backward(plan: Plan, kept: Any, cotangents: tuple[Array, Array]) -> Any:
    rows, keys, out, lse = kept
    dout, dlse = cotangents
    empty = jnp.isneginf(lse)
    d = jnp.sum(dout.astype(lse.dtype) * out.astype(lse.dtype), axis=-1) - jnp.where(empty, 0, dlse)
    upstream = dout, jnp.where(empty, jnp.inf, lse), d  # e^{s - L} is 0 in a row without keys
    of_keys = _numbers(plan, keys)

    def of_some(sums: tuple[Array, Array], some: Some) -> tuple[tuple[Array, Array], Array]:
        dk, dv = sums
        dout, lse, d = some.upstream
        q = some.rows.q
        k, v, s = _logits(plan, some, keys, of_keys)
        p = jnp.exp(s - lse[..., None])
        ds = p * (contract("exyv,ejv->exyj", dout, v) - d[..., None])
        if plan.logits_soft_cap is not None:
            ds *= 1 - jnp.square(jnp.where(jnp.isneginf(s), 0, s) / plan.logits_soft_cap)
        ds = ds.astype(k.dtype)
        dk += contract("exyj,exyk->ejk", ds, q)
        dv += contract("exyj,exyv->ejv", p.astype(dout.dtype), dout)
        return (dk, dv), (plan.scale * contract("exyj,ejk->exyk", ds, k)).astype(q.dtype)

    zeros = lambda x: jnp.zeros_like(x, accumulation_dtype(x.dtype))  # noqa: E731
    (dk, dv), dq = jax.lax.scan(of_some, (zeros(keys.k), zeros(keys.v)), _split(plan, rows, keys, upstream))
    none: Any = None  # positions, lists and masks have no gradient
    return (
        Rows(_join(dq, rows), none, none, none),
        Keys((plan.scale * dk).astype(keys.k.dtype), dv.astype(keys.v.dtype), none, none, none),
    )


_marked.defvjp(_keep_arguments, _backward)


def _logits(
    plan: Plan, some: Some, keys: Keys, of_keys: Array | None
) -> tuple[Float[Array, "E M K"], Float[Array, "E M V"], Float[Array, "E C Y M"]]:
    """Keys, values, and logits: -inf where a key is not read."""
    of_one = functools.partial(_allowed, plan, some.which)
    allowed = jax.vmap(of_one, in_axes=(0, EACH, 0, 0))(some.rows, keys, some.listed, of_keys)
    read = jnp.any(allowed, axis=(1, 2))[..., None]  # what is not may hold anything: 0 * NaN would reach the sums
    k, v = (jnp.where(read, x, 0) for x in (keys.k, keys.v))
    s = plan.scale * contract("exyk,ejk->exyj", some.rows.q, k)
    if plan.logits_soft_cap is not None:
        s = plan.logits_soft_cap * jnp.tanh(s / plan.logits_soft_cap)
    return k, v, jnp.where(allowed, s, -jnp.inf)


def _allowed(
    plan: Plan,
    which: Int[Array, " C"],
    rows: Rows,
    keys: Keys,
    listed: Bool[Array, "C N"],
    of_keys: Int[Array, " M"] | None,
) -> Bool[Array, "C Y M"]:
    """Of one of E: what is on the list of a row, and may be read."""
    length = keys.k.shape[0]
    if of_keys is None:
        listed = jnp.repeat(listed, plan.width, axis=1)[:, :length]
    else:
        listed = jnp.take(listed, of_keys, axis=1)
    position = jnp.broadcast_to(jnp.arange(length), (rows.position.shape[0], length))
    return pairs_to_read(plan, keys, rows, position, which, length) & listed[:, None]


def _numbers(plan: Plan, keys: Keys) -> Int[Array, "E M"] | None:
    """The block of each key in its document; None where there are no documents."""
    if keys.segments is None:
        return None
    return (jnp.arange(keys.segments.shape[1]) - first_tokens(keys.segments)) // plan.width


def _listed(plan: Plan, rows: Rows, keys: Keys) -> Bool[Array, "E X N"]:
    pairs, length = keys.k.shape[:2]
    starts = rows.starts
    if keys.segments is not None:  # each query is a token of the row
        starts = starts - jnp.take_along_axis(first_tokens(keys.segments), rows.position[:, :, 0], axis=1)[..., None]
    number = jnp.where(rows.starts < length, starts // plan.width, length)
    at = jnp.arange(pairs)[:, None, None], jnp.arange(starts.shape[1])[:, None], number
    return jnp.zeros((*starts.shape[:2], -(-length // plan.width)), bool).at[at].set(True, mode="drop")


def _split(plan: Plan, rows: Rows, keys: Keys, upstream: Any = None) -> Some:
    """N chunks of rows, stacked."""
    pairs, count, queries = rows.position.shape
    size = max(1, min(count, LOGITS // (pairs * queries * keys.k.shape[1])))
    chunks = -(-count // size)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, chunks * size - count), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(pairs, chunks, size, *x.shape[2:]), 1, 0)

    of_rows = rows._replace(starts=rows.q)  # lists are not looked at again
    which = jnp.arange(chunks * size).reshape(chunks, size)
    return Some(which, *jax.tree.map(split, (of_rows, _listed(plan, rows, keys), upstream)))


def _join(x: Float[Array, "N E C ..."], rows: Rows) -> Float[Array, "E X ..."]:
    pairs, count = rows.position.shape[:2]
    return jnp.moveaxis(x, 0, 1).reshape(pairs, x.shape[0] * x.shape[2], *x.shape[3:])[:, :count]
