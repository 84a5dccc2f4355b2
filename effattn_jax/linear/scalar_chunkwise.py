"""Scalar decay over chunks, as products of matrices, with a backward pass of its own.

In a chunk that starts from S, with G_i = g_1 + ... + g_i and every exponent <= 0:

    O = s ((Q K^T) * D) V + s diag(e^G) Q S        D_ij = e^{G_i - G_j} for j <= i
    S' = e^{G_C} S + (diag(e^{G_C - G}) K)^T V

Backward, with dS' the cotangent of what leaves the chunk, from the last chunk to the first:

    dS = e^{G_C} dS' + Q^T diag(s e^G) dO                     E = s (dO V^T) * D
    dQ = E K + diag(s e^G) dO S^T                             dG_i - dG_j of a pair: E_ij (q_i . k_j)
    dK = E^T Q + diag(e^{G_C - G}) V dS'^T                    dG_i of a read: q_i . (the second term of dQ)
    dV = (s (Q K^T) * D)^T dO + diag(e^{G_C - G}) K dS'       d(G_C - G_j) of a write: k_j . (the second term of dK)

Only the arguments are kept for it. Products read and write the dtype of the arguments, sums over tokens and chunks are
in float32: differentiating the forward pass instead multiplies and stores float32, at twice the bytes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.linear.affine import DiagonalMap, entering_states
from effattn_jax.linear.chunks import from_chunks, to_chunks
from effattn_jax.linear.decay import DecaySum, constant_decay_sum, decay_sum, pairwise_exponent
from effattn_jax.linear.segments import chunk_masks
from effattn_jax.precision import contract, zeros_varying
from effattn_jax.typing import Array, Bool, Float, HeadDecay, MatrixState, SegmentIds


class Shape(NamedTuple):
    """N chunks of C tokens; each of G groups of heads shares queries and keys among its R heads of values."""

    length: int
    chunk: int
    groups: int
    repeats: int


class Exponents(NamedTuple):
    """Logarithms of what decays, 1 for B, N where all chunks are alike."""

    pairs: Float[Array, "N B G R C C"]  # from token j to token i
    to_end: Float[Array, "N B G R C"]  # from token j to the end of the chunk
    from_start: Float[Array, "N B G R C"]  # from the start of the chunk to token i
    whole: Float[Array, "N B G R"]


class Visible(NamedTuple):
    """Where documents let the decays act."""

    pairs: Bool[Array, "N B G R C C"]
    to_end: Bool[Array, "N B G R C"]
    from_start: Bool[Array, "N B G R C"]
    whole: Bool[Array, "N B G R"]


def chunkwise(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: HeadDecay,
    initial_state: MatrixState,
    segment_ids: SegmentIds | None,
    scale: float,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T H V"], MatrixState]:
    """The module's equations, chunk after chunk, in reverse mode any number of times; out in the dtype of v.

    Products are of the dtype of v. Queries and keys may be wider: then their gradients are too, which sums over tokens
    that cancel need.
    """
    # one set of varying mesh axes for all: outside of `shard_map` the zero is none
    given = [x for x in (q, k, v, log_decay, initial_state, segment_ids) if x is not None]
    zero = zeros_varying((), jnp.float32, *given)
    q, k, v, log_decay, initial_state = (x + zero.astype(x.dtype) for x in (q, k, v, log_decay, initial_state))
    return _chunkwise(_shape(q, v, chunk or _chunk(q)), scale, q, k, v, log_decay, initial_state, segment_ids)


def associative(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: HeadDecay,
    initial_state: MatrixState,
    segment_ids: SegmentIds | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], MatrixState]:
    """The same, chunks combined by `lax.associative_scan`; JAX differentiates it, in any mode."""
    run = functools.partial(_forward, _shape(q, v, _chunk(q)), scale, associative=True)
    return jax.checkpoint(run)(q, k, v, log_decay, initial_state, segment_ids)


def parallel(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: HeadDecay,
    initial_state: MatrixState,
    segment_ids: SegmentIds | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], MatrixState]:
    """The same, where the whole row is one chunk: O = s ((Q K^T) * D) V. JAX differentiates it, in any mode."""
    shape = _shape(q, v, max(1, q.shape[1]))
    return _forward(shape, scale, q, k, v, log_decay, initial_state, segment_ids)


def _chunk(q: Array) -> int:
    return 64 if q.shape[-1] <= 64 else 128  # of the order of K: balances C^2 (K + V) work in chunks, C K V on states


def _shape(q: Array, v: Array, chunk: int) -> Shape:
    return Shape(q.shape[1], chunk, q.shape[2], v.shape[2] // q.shape[2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunkwise(
    shape: Shape,
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    initial_state: Array,
    segment_ids: Array | None,
) -> tuple[Array, Array]:
    return _forward(shape, scale, q, k, v, log_decay, initial_state, segment_ids)


def _forward(
    shape: Shape,
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    initial_state: Array,
    segment_ids: Array | None,
    associative: bool = False,
) -> tuple[Array, Array]:
    exponents, visible = _exponents(shape, log_decay, segment_ids), _visible(shape, segment_ids)
    decays = _decays(exponents, visible)
    q, k, v = _queries(shape, q.astype(v.dtype)), _queries(shape, k.astype(v.dtype)), _values(shape, v)
    scores = contract("nbgik,nbgjk->nbgij", q, k)[:, :, :, None] * (scale * decays.pairs)
    inside = contract("nbgrij,nbgrjv->nbgriv", scores.astype(v.dtype), v)
    maps, state = _maps(decays, k, v), _state(shape, initial_state)
    if associative:
        entering, state = entering_states(maps, state, associative=True)
    else:
        entering, state = _passed(maps, state, q.dtype)
    read = contract("nbgck,nbgrkv->nbgrcv", q, entering.astype(q.dtype)) * (scale * decays.from_start[..., None])
    return _from_values(shape, (inside + read).astype(v.dtype)), state.reshape(initial_state.shape)


def _keep_arguments(shape: Shape, scale: float, *arguments: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    return _chunkwise(shape, scale, *arguments), arguments


def _backward(
    shape: Shape, scale: float, arguments: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    q, k, v, log_decay, initial_state, segment_ids = arguments
    exponents, to_gates = jax.vjp(lambda g: _exponents(shape, g, segment_ids), log_decay)
    decays = _decays(exponents, _visible(shape, segment_ids))
    dtypes = q.dtype, k.dtype
    q, k, v, do = (
        *(_queries(shape, x.astype(v.dtype)) for x in (q, k)),
        *(_values(shape, x) for x in (v, cotangents[0])),
    )

    # the states that enter the chunks, and the cotangents of those that leave them
    maps = _maps(decays, k, v)
    read = _round(do, scale * decays.from_start)
    back = DiagonalMap(maps.keep, contract("nbgck,nbgrcv->nbgrkv", q, read))
    entering, _ = _passed(maps, _state(shape, initial_state), q.dtype)
    leaving, d_state = _passed(back, _state(shape, cotangents[1]), q.dtype, reverse=True)

    # pairs inside of a chunk
    scores = _product("nbgik,nbgjk->nbgij", q, k)[:, :, :, None]
    d_scores = _product("nbgriv,nbgrjv->nbgrij", do, v) * (scale * decays.pairs)
    d_pairs = scores * d_scores
    weights = (scores * (scale * decays.pairs)).astype(v.dtype)
    d_scores = jnp.sum(d_scores, 3).astype(q.dtype)

    # reads of the entering state and writes to the leaving one
    dq_read = _product("nbgrcv,nbgrkv->nbgrck", read, entering)
    dk_write = _product("nbgrcv,nbgrkv->nbgrck", _round(v, decays.to_end), leaving)
    d_from_start = _dot(q[:, :, :, None], dq_read)
    d_to_end = _dot(k[:, :, :, None], dk_write)
    d_whole = decays.whole * jnp.sum(_dot(entering, leaving), -1)

    dq = _product("nbgij,nbgjk->nbgik", d_scores, k) + jnp.sum(dq_read.astype(d_state.dtype), 3)
    dk = _product("nbgij,nbgik->nbgjk", d_scores, q) + jnp.sum(dk_write.astype(d_state.dtype), 3)
    dv_write = _product("nbgck,nbgrkv->nbgrcv", k, leaving) * decays.to_end[..., None]
    dv = _product("nbgrij,nbgriv->nbgrjv", weights, do) + dv_write
    (d_gate,) = to_gates(jax.tree.map(_like, Exponents(d_pairs, d_to_end, d_from_start, d_whole), exponents))
    return (
        _from_queries(shape, dq.astype(dtypes[0])),
        _from_queries(shape, dk.astype(dtypes[1])),
        _from_values(shape, dv.astype(v.dtype)),
        d_gate,
        d_state.reshape(initial_state.shape),
        None,
    )


_chunkwise.defvjp(_keep_arguments, _backward)


def _product(equation: str, x: Array, y: Array) -> Array:
    """`contract` with a result in the dtype of the operands; an accelerator accumulates in float32 still."""
    if x.dtype.itemsize >= 4:
        return contract(equation, x, y)
    return jnp.einsum(equation, x, y, preferred_element_type=x.dtype)


def _round(x: Float[Array, "... C V"], factor: Float[Array, "... C"]) -> Array:
    return (x * factor[..., None]).astype(x.dtype)


def _dot(x: Float[Array, "... C K"], y: Float[Array, "... C K"]) -> Float[Array, "... C"]:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.sum(x.astype(dtype) * y.astype(dtype), -1)


def _like(x: Array, shaped: Array) -> Array:
    """Summed over the axes along which `shaped` is broadcast."""
    axes = tuple(i for i, size in enumerate(shaped.shape) if size != x.shape[i])
    return jnp.sum(x, axes, keepdims=True).astype(shaped.dtype)


def _maps(decays: Exponents, k: Array, v: Array) -> DiagonalMap:
    """What each chunk does to the state."""
    written = contract("nbgck,nbgrcv->nbgrkv", k, _round(v, decays.to_end))
    return DiagonalMap(jnp.broadcast_to(decays.whole, written.shape[:4])[..., None, None], written)


def _passed(
    maps: DiagonalMap, state: Array, dtype: jnp.dtype, reverse: bool = False
) -> tuple[Float[Array, "N B G R K V"], Array]:
    """The state before each chunk, rounded to `dtype`, and the last; from the last chunk to the first if `reverse`."""

    def step(state: Array, chunk: DiagonalMap) -> tuple[Array, Array]:
        return chunk(state), state.astype(dtype)

    state, passed = jax.lax.scan(step, state, maps, unroll=4, reverse=reverse)
    return passed, state


def _sums(shape: Shape, log_decay: Array, segment_ids: Array | None) -> DecaySum:
    heads = (shape.groups, shape.repeats)
    if log_decay.ndim == 1:
        # chunks without padding are alike: one D serves them
        whole = jnp.ones((1, shape.chunk if shape.length % shape.chunk == 0 else shape.length), bool)
        real = _chunks(shape, whole if segment_ids is None else segment_ids >= 0)
        return constant_decay_sum(log_decay.reshape(*heads, 1), real[:, :, None, None])
    gates = log_decay if segment_ids is None else jnp.where(segment_ids[..., None] >= 0, log_decay, 0)
    gates = jnp.moveaxis(_chunks(shape, gates), 2, 3)
    return decay_sum(gates.reshape(*gates.shape[:2], *heads, shape.chunk))


def _exponents(shape: Shape, log_decay: Array, segment_ids: Array | None) -> Exponents:
    sums = _sums(shape, log_decay, segment_ids)
    return Exponents(pairwise_exponent(sums), sums.to_end, sums.total, sums.total[..., -1])


def _visible(shape: Shape, segment_ids: Array | None) -> Visible:
    causal = jnp.tril(jnp.ones((shape.chunk, shape.chunk), bool))
    if segment_ids is None:
        yes = jnp.ones((1,) * 5, bool)
        return Visible(causal, yes, yes, yes[..., 0])
    masks = chunk_masks(to_chunks(segment_ids, shape.chunk, fill=-1))
    chunks_first = (jnp.swapaxes(m, 0, 1)[:, :, None, None] for m in (masks.inside, masks.out, masks.into, masks.keep))
    inside, out, into, keep = chunks_first
    return Visible(causal & inside, out, into, keep)


def _decays(exponents: Exponents, visible: Visible) -> Exponents:
    """e^x where visible, else 0. The mask comes first: above the diagonal an exponent is positive and may overflow."""
    return Exponents(*(jnp.exp(jnp.where(m, x, -jnp.inf)) for x, m in zip(exponents, visible, strict=True)))


def _chunks(shape: Shape, x: Float[Array, "B T ..."]) -> Float[Array, "N B C ..."]:
    """Chunks first, as a scan over them takes and gives them."""
    return jnp.swapaxes(to_chunks(x, shape.chunk), 0, 1)


def _queries(shape: Shape, x: Float[Array, "B T G K"]) -> Float[Array, "N B G C K"]:
    return jnp.moveaxis(_chunks(shape, x), 2, 3)


def _values(shape: Shape, x: Float[Array, "B T H V"]) -> Float[Array, "N B G R C V"]:
    x = _queries(shape, x)
    return x.reshape(*x.shape[:2], shape.groups, shape.repeats, *x.shape[3:])


def _from_queries(shape: Shape, x: Float[Array, "N B G C K"]) -> Float[Array, "B T G K"]:
    return from_chunks(jnp.transpose(x, (1, 0, 3, 2, 4)), shape.length)


def _from_values(shape: Shape, x: Float[Array, "N B G R C V"]) -> Float[Array, "B T H V"]:
    return _from_queries(shape, x.reshape(*x.shape[:2], shape.groups * shape.repeats, *x.shape[4:]))


def _state(shape: Shape, state: Float[Array, "B H K V"]) -> Float[Array, "B G R K V"]:
    return state.reshape(state.shape[0], shape.groups, shape.repeats, *state.shape[2:])
