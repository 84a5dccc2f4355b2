"""Softmax attention whose rows list the spans of keys they read: memory linear in T, forward and backward.

A row is some queries that share a list; a span is `width` consecutive keys, named by its first. A step takes a few
rows and a few spans of each, gathers their keys and goes on with the online softmax of `flash`. The gradients of keys
and values walk the transposed lists: the pairs of row and span are sorted by span, so that the rows that read a span
come together, in tiles; tiles follow each other, so that no two add to a key at once and a sum is the same every time.
Spans of less than `NARROW` keys would make tiles of nothing: their rows mark the keys they read, and meet all keys.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.precision import accumulation_dtype, contract, zeros_varying
from effattn_jax.sparse.mask import same_document
from effattn_jax.typing import Array, Bool, Float, Int

NARROW = 16  # keys of a span
GATHERED = 2**23  # numbers of keys and values in flight
TILE = 256  # queries that meet a span at once in the backward pass


class Plan(NamedTuple):
    """What is known at trace time."""

    width: int
    causal: bool
    scale: float
    logits_soft_cap: float | None


class Rows(NamedTuple):
    """X rows of Y queries each, for each of E pairs of a batch row and a key head."""

    q: Float[Array, "E X Y K"]
    position: Int[Array, "E X Y"]
    segments: Int[Array, "E X Y"] | None
    starts: Int[Array, "E X n"]  # ascending, each once; M stands for none


class Keys(NamedTuple):
    k: Float[Array, "E M K"]
    v: Float[Array, "E M V"]
    segments: Int[Array, "E M"] | None
    readable: Bool[Array, "E J M"] | None  # row x reads those of entry x % J
    mask: Any  # a mask of positions (see `effattn_jax.sparse.mask`), or None


ZERO: Any = 0
EACH = Keys(ZERO, ZERO, ZERO, ZERO, None)  # axes of E: a mask is the same for all


def span_attention(plan: Plan, rows: Rows, keys: Keys) -> tuple[Float[Array, "E X Y V"], Float[Array, "E X Y"]]:
    """Out, and the log-sum-exp of the logits in the dtype of accumulation; of a row without keys 0 and -inf."""
    zero = zeros_varying((), jnp.float32, *jax.tree.leaves((rows, keys)))
    q, k, v = (x + zero.astype(x.dtype) for x in (rows.q, keys.k, keys.v))
    rows, keys = rows._replace(q=q), keys._replace(k=k, v=v)
    if rows.starts.shape[2] == 0:
        rows = rows._replace(starts=jnp.full_like(rows.starts, k.shape[1], shape=(*rows.starts.shape[:2], 1)))
    return _attend(plan, rows, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, rows: Rows, keys: Keys) -> tuple[Array, Array]:
    return _over_rows(plan, rows, keys, _forward)


def _attend_forward(plan: Plan, rows: Rows, keys: Keys) -> Any:
    out, lse = _attend(plan, rows, keys)
    return (out, lse), (rows, keys, out, lse)


def _attend_backward(plan: Plan, kept: Any, cotangents: tuple[Array, Array]) -> Any:
    rows, keys, out, lse = kept
    dout, dlse = cotangents
    empty = jnp.isneginf(lse)
    lse = jnp.where(empty, jnp.inf, lse)  # e^{s - L} is 0 in a row without keys
    d = jnp.sum(dout.astype(lse.dtype) * out.astype(lse.dtype), axis=-1) - jnp.where(empty, 0, dlse)
    upstream = Upstream(dout, lse, d)
    dq = _over_rows(plan, rows, keys, _query_gradient, upstream)
    of_keys = _key_gradients_by_mark if plan.width < NARROW else _key_gradients_by_span
    dk, dv = of_keys(plan, rows, keys, upstream)
    none: Any = None  # positions, lists and masks have no gradient
    return (
        Rows(dq.astype(rows.q.dtype), none, none, none),
        Keys(dk.astype(keys.k.dtype), dv.astype(keys.v.dtype), none, none, none),
    )


_attend.defvjp(_attend_forward, _attend_backward)


class Upstream(NamedTuple):
    """What the gradients of a row are made of."""

    dout: Float[Array, "E X Y V"]
    lse: Float[Array, "E X Y"]
    d: Float[Array, "E X Y"]  # dout . out - dlse


def _chunks(x: Array, count: int, size: int, fill: Any = 0) -> Array:
    """[E, X, ...] -> [count, E, size, ...]"""
    x = jnp.pad(x, ((0, 0), (0, count * size - x.shape[1]), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def _over_rows(plan: Plan, rows: Rows, keys: Keys, of_chunk: Any, *extra: Any) -> Any:
    """`of_chunk` of some rows at a time, for all E side by side."""
    pairs, count, spans = rows.starts.shape
    together = max(1, min(spans, 512 // plan.width))  # spans of a step
    numbers = pairs * together * plan.width * (keys.k.shape[-1] + keys.v.shape[-1])
    size = min(count, max(1, GATHERED // numbers), 256)
    chunks = -(-count // size)
    size = -(-count // chunks)
    starts = jnp.pad(rows.starts, ((0, 0), (0, 0), (0, -spans % together)), constant_values=keys.k.shape[1])
    listed = _chunks(starts, chunks, size, keys.k.shape[1])
    most = jnp.max(jnp.sum(listed < keys.k.shape[1], axis=-1), axis=(1, 2))  # spans of the longest list of a chunk
    steps = -(-most // together)
    inputs = jax.tree.map(lambda x: _chunks(x, chunks, size), (rows._replace(starts=rows.q), extra))
    which = jnp.arange(chunks * size).reshape(chunks, size)
    padded = _padded(plan, keys)

    def step(_: None, of: Any) -> Any:
        (chunk, extra), listed, steps, which = of
        one = functools.partial(of_chunk, plan, together, steps, which)
        each = jax.vmap(one, in_axes=(0, EACH, *(0 for _ in extra)))
        return None, each(chunk._replace(starts=listed), padded, *extra)

    result = jax.lax.scan(step, None, (inputs, listed, steps, which))[1]
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(pairs, chunks * size, *x.shape[3:])[:, :count], result)


def _padded(plan: Plan, keys: Keys) -> Keys:
    """Keys with a span of nothing behind them, which is read where a list has ended."""
    pad = lambda x, axis, fill=0: jnp.pad(  # noqa: E731
        x, [(0, plan.width if i == axis else 0) for i in range(x.ndim)], constant_values=fill
    )
    return keys._replace(
        k=pad(keys.k, 1),
        v=pad(keys.v, 1),
        segments=None if keys.segments is None else pad(keys.segments, 1, -1),
        readable=None if keys.readable is None else pad(keys.readable, 2, False),
    )


def _side_by_side(x: Array) -> Array:
    """[C, n, width, ...] -> [C, n * width, ...]"""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _gather(x: Array, starts: Int[Array, "*rows"], width: int) -> Array:
    """The spans of x [M, ...] that begin at `starts`, side by side: [*rows, width, ...]."""
    take = lambda start: jax.lax.dynamic_slice_in_dim(x, start, width)  # noqa: E731
    for _ in starts.shape:
        take = jax.vmap(take)
    return take(starts)


def _logits(
    plan: Plan, q: Float[Array, "C Y K"], k: Float[Array, "C J K"], may_read: Bool[Array, "C Y J"]
) -> tuple[Float[Array, "C Y J"], Float[Array, "C Y J"] | float]:
    """s, -inf where a query does not read a key, and ds / d(q . k)."""
    s = plan.scale * contract("cyk,cjk->cyj", q, k)
    slope: Array | float = plan.scale
    if plan.logits_soft_cap is not None:
        capped = jnp.tanh(s / plan.logits_soft_cap)
        s, slope = plan.logits_soft_cap * capped, plan.scale * (1 - jnp.square(capped))
    return jnp.where(may_read, s, -jnp.inf), slope


def pairs_to_read(
    plan: Plan, keys: Keys, rows: Rows, position: Int[Array, "C J"], which: Int[Array, " C"], length: int
) -> Bool[Array, "C Y J"]:
    """Whether the queries of a row may read keys at `position` [C, J], their own lists apart."""
    own, other = rows.position[:, :, None], position[:, None, :]
    allowed = jnp.broadcast_to(other < length, jnp.broadcast_shapes(own.shape, other.shape))
    if plan.causal:
        allowed &= other <= own
    if rows.segments is not None and keys.segments is not None:
        allowed &= same_document(rows.segments[:, :, None], keys.segments[position][:, None, :])
    if keys.readable is not None:
        entry = which % keys.readable.shape[0]
        allowed &= keys.readable[entry[:, None], position][:, None, :]
    if keys.mask is not None:
        allowed &= keys.mask(own, other)
    return allowed


def _visited(
    plan: Plan, together: int, which: Array, rows: Rows, keys: Keys, step: Array
) -> tuple[Float[Array, "C J K"], Float[Array, "C J V"], Float[Array, "C Y J"], Any]:
    """Keys, values and logits of spans step * together, ... of every row."""
    starts = jax.lax.dynamic_slice_in_dim(rows.starts, step * together, together, axis=1)
    position = _side_by_side(starts[:, :, None] + jnp.arange(plan.width))
    may_read = pairs_to_read(plan, keys, rows, position, which, keys.k.shape[0] - plan.width)
    read = jnp.any(may_read, axis=1)[:, :, None]  # what is not may hold anything: 0 * NaN would reach the sums
    k, v = (jnp.where(read, _side_by_side(_gather(x, starts, plan.width)), 0) for x in (keys.k, keys.v))
    s, slope = _logits(plan, rows.q, k, may_read)
    return k, v, s, slope


def _forward(plan: Plan, together: int, steps: Array, which: Array, rows: Rows, keys: Keys) -> tuple[Array, Array]:
    accumulate = accumulation_dtype(rows.q.dtype)

    def visit(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, weighted = carry
        _, v, s, _ = _visited(plan, together, which, rows, keys, step)
        new_top = jnp.maximum(top, jnp.max(s, axis=-1))
        p = jnp.exp(s - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        total = shrink * total + jnp.sum(p, axis=-1)
        return new_top, total, shrink[..., None] * weighted + contract("cyj,cjv->cyv", p.astype(v.dtype), v)

    shape = rows.q.shape[:2]
    # a finite floor: e^{s - m} is 0, not NaN, while a row has met no key
    top = jnp.full_like(rows.q, jnp.finfo(accumulate).min / 2, shape=shape, dtype=accumulate)
    total = jnp.zeros_like(rows.q, shape=shape, dtype=accumulate)
    weighted = jnp.zeros_like(rows.q, shape=(*shape, keys.v.shape[-1]), dtype=accumulate)
    top, total, weighted = jax.lax.fori_loop(0, steps, visit, (top, total, weighted))
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return (weighted / total[..., None]).astype(rows.q.dtype), jnp.where(empty, -jnp.inf, top + jnp.log(total))


def _pair_gradients(s: Array, slope: Any, v: Array, upstream: Upstream, dtype: Any) -> tuple[Array, Array]:
    """P and dS of rows and the keys they have met."""
    p = jnp.exp(s - upstream.lse[..., None])
    dp = contract("cyv,cjv->cyj", upstream.dout, v.astype(upstream.dout.dtype))
    return p, jnp.where(p == 0, 0, p * (dp - upstream.d[..., None]) * slope).astype(dtype)


def _flat(x: Array) -> Array:
    """All queries of some rows as one row."""
    return x.reshape(1, -1, *x.shape[2:])


def _key_parts(
    plan: Plan, rows: Rows, k: Array, v: Array, may_read: Bool[Array, "C Y J"], upstream: Upstream
) -> tuple[Float[Array, "J K"], Float[Array, "J V"]]:
    """What rows give to the gradients of keys and values that all of them meet."""
    q, upstream = _flat(rows.q), jax.tree.map(_flat, upstream)
    s, slope = _logits(plan, q, k[None], _flat(may_read))
    p, ds = _pair_gradients(s, slope, v[None], upstream, q.dtype)
    dk = contract("cyj,cyk->jk", ds, q)
    return dk, contract("cyj,cyv->jv", p.astype(upstream.dout.dtype), upstream.dout)


def _query_gradient(
    plan: Plan, together: int, steps: Array, which: Array, rows: Rows, keys: Keys, upstream: Upstream
) -> Float[Array, "C Y K"]:
    def visit(step: Array, dq: Array) -> Array:
        k, v, s, slope = _visited(plan, together, which, rows, keys, step)
        _, ds = _pair_gradients(s, slope, v, upstream, k.dtype)
        return dq + contract("cyj,cjk->cyk", ds, k)

    zeros = jnp.zeros_like(rows.q, dtype=accumulation_dtype(rows.q.dtype))
    return jax.lax.fori_loop(0, steps, visit, zeros)


class Transposed(NamedTuple):
    """The pairs of a row and a span that it reads, in ascending order of spans, cut into tiles of one span each."""

    span: Int[Array, "E Xn"]
    reader: Int[Array, "E Xn"]  # row
    first: Int[Array, "E Xn"]  # pair of a tile
    tiles: Int[Array, " E"]


def _transpose(starts: Int[Array, "X n"], length: int, tile: int) -> Transposed:
    """Of one of E."""
    flat = starts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    span = flat[order]
    place = jnp.arange(len(flat)) - jnp.searchsorted(span, span)  # among the pairs of its span
    begins = (place % tile == 0) & (span < length)
    (first,) = jnp.nonzero(begins, size=len(flat), fill_value=0)
    return Transposed(span, order // starts.shape[1], first, jnp.sum(begins))


def _key_gradients_by_span(plan: Plan, rows: Rows, keys: Keys, upstream: Upstream) -> tuple[Array, Array]:
    """Tile by tile of the transposed lists."""
    length, tile = keys.k.shape[1], max(1, TILE // rows.q.shape[2])
    padded = _padded(plan, keys)
    transposed = jax.vmap(lambda starts: _transpose(starts, length, tile))(rows.starts)

    def one(n: Array, of: Transposed, rows: Rows, keys: Keys, upstream: Upstream, dk: Array, dv: Array) -> Any:
        pairs = len(of.span)
        first = of.first[jnp.minimum(n, pairs - 1)]
        pair = jnp.minimum(first + jnp.arange(tile), pairs - 1)
        exists = n < of.tiles
        start = jnp.where(exists, of.span[first], length)
        mine = exists & (first + jnp.arange(tile) < pairs) & (of.span[pair] == start)
        which = of.reader[pair]
        some = jax.tree.map(lambda x: x[which], (rows._replace(starts=jnp.arange(rows.q.shape[0])), upstream))
        span_of = lambda x: jax.lax.dynamic_slice_in_dim(x, start, plan.width)  # noqa: E731
        position = jnp.broadcast_to(start + jnp.arange(plan.width), (tile, plan.width))
        may_read = pairs_to_read(plan, keys, some[0], position, which, length) & mine[:, None, None]
        parts = _key_parts(plan, some[0], span_of(keys.k), span_of(keys.v), may_read, some[1])
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(total, part + span_of(total), start, axis=0)
            for total, part in zip((dk, dv), parts, strict=True)
        )

    of_all = jax.vmap(one, in_axes=(None, 0, 0, EACH, 0, 0, 0))
    step = lambda n, sums: of_all(n, transposed, rows, padded, upstream, *sums)  # noqa: E731
    accumulate = accumulation_dtype(rows.q.dtype)
    zeros = tuple(jnp.zeros_like(x, dtype=accumulate) for x in (padded.k, padded.v))
    dk, dv = jax.lax.fori_loop(0, jnp.max(transposed.tiles), step, zeros)
    return dk[:, :length], dv[:, :length]


def _key_gradients_by_mark(plan: Plan, rows: Rows, keys: Keys, upstream: Upstream) -> tuple[Array, Array]:
    """Some rows at a time against all keys, of which they mark those they read."""
    length, (pairs, count, _), queries = keys.k.shape[1], rows.starts.shape, rows.q.shape[2]
    size = min(count, max(1, GATHERED // (pairs * queries * length)))
    chunks = -(-count // size)
    position = jnp.arange(length)

    def one(which: Array, rows: Rows, upstream: Upstream, keys: Keys, dk: Array, dv: Array) -> tuple[Array, Array]:
        read = (rows.starts[:, :, None] + jnp.arange(plan.width)).reshape(rows.starts.shape[0], -1)
        marked = (
            jnp.zeros((read.shape[0], length), bool).at[jnp.arange(read.shape[0])[:, None], read].set(True, mode="drop")
        )
        everywhere = jnp.broadcast_to(position, marked.shape)
        may_read = pairs_to_read(plan, keys, rows, everywhere, which, length) & marked[:, None, :]
        dk_part, dv_part = _key_parts(plan, rows, keys.k, keys.v, may_read, upstream)
        return dk + dk_part, dv + dv_part

    def step(sums: tuple[Array, Array], of: Any) -> Any:
        which, starts, chunk, upstream = of
        each = jax.vmap(functools.partial(one, which), in_axes=(0, 0, EACH, 0, 0))
        return each(chunk._replace(starts=starts), upstream, keys, *sums), None

    accumulate = accumulation_dtype(rows.q.dtype)
    zeros = jnp.zeros_like(keys.k, dtype=accumulate), jnp.zeros_like(keys.v, dtype=accumulate)
    which = jnp.arange(chunks * size).reshape(chunks, size)
    starts = _chunks(rows.starts, chunks, size, length)
    inputs = jax.tree.map(lambda x: _chunks(x, chunks, size), (rows._replace(starts=rows.q), upstream))
    return jax.lax.scan(step, zeros, (which, starts, *inputs))[0]
