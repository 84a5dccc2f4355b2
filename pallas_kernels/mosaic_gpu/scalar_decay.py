"""Scalar decay on Hopper GPUs, forward and backward by one kernel (`scan`).

    S_t = e^{g_t} S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

Every gradient is a scan of the same shape as the forward pass, two of them backwards in time:

    dq_i = scale sum_{j <= i} e^{G_i - G_j} (do_i . v_j) k_j     what a memory of v with the values k answers to do
    dk_j = scale sum_{i >= j} e^{G_i - G_j} (v_j . do_i) q_i
    dv_j = scale sum_{i >= j} e^{G_i - G_j} (k_j . q_i) do_i     its last state is dS_0

so nothing but the inputs is kept for the backward pass. The gradient of a gate, in a chunk that state S enters and dS'
leaves backwards, is made of dots of the float32 results before they are rounded:

    dg_t = sum_{i >= t} (q_i . dq_i - k_i . (dk_i inside the chunk))
         + sum_{j < t} k_j . (dk_j from dS') + e^{G_C} <S, dS'>

where all that cancels was rounded alike (with sums over the whole row, gates of -4 lose 30 % of their gradient to the
rounding of states). For the last term alone the scan of dq leaves its states in memory, 2 K V bytes a chunk.

The start of a document has the gate -120: e^{-120} is 0 in float32, so all that would cross it vanishes.

Floors of the forward pass at B4 T8192 H16 K = V = 128: q, k, v and o once are 0.54 GB, 0.13 ms at the 4.25 TB/s of an
H200; the products are 86 GFLOP with the scores made twice, 0.11 ms at 790 TFLOP/s. q and k are read by two blocks of
threads each, which run at the same time: the second read is one of the cache. The backward pass moves 2.1 GB, 0.51 ms,
and makes three times the products. Measured on an H200: 0.274 ms forward, 1.465 with the backward pass.

Dao and Gu 2024, arXiv:2405.21060 (the chunked form).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.parts import scan_in_parts
from pallas_kernels.mosaic_gpu.scan import CHUNK, Extras, Factors

DIMS = (64, 128)  # of q, k and v; smaller ones are filled up with zeros
BOUNDARY = -120.0  # the gate between two documents
NOTHING = -1e30  # the exponent of a token that is not there
LOG2E = math.log2(math.e)


def scalar_decay(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    *,
    scale: float,
    parts: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The equation above for every head: out [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32.

    Differentiable once, in all arrays of floats.

    Args:
      q, k: [B, T, heads, K], v: [B, T, heads, V] in bfloat16 or float16; heads divide H, each serves consecutive ones.
      log_decay: [B, T, H], float32, <= 0.
      initial_state: [B, H, K, V], float32: the memory of the first document of each row.
      segment_ids: [B, T], documents of packed rows, never decreasing along a row but for negative ids, which mark
        padding: such a token writes nothing, reads zero and lets the state pass.
      scale: > 0.
      parts: how many each row is cut into; None: as many as fill the chip.
      interpret: parameters of the interpreter that runs the kernel on a CPU.

    Raises:
      NotImplementedError: other dtypes, K or V above 128, a scale that is not a positive number.
    """
    if v.dtype not in (jnp.bfloat16, jnp.float16) or q.dtype != v.dtype or k.dtype != v.dtype:
        raise NotImplementedError(f"q, k, v of {q.dtype}, {k.dtype}, {v.dtype}; needs one of bfloat16, float16")
    key_dim, value_dim, length = q.shape[-1], v.shape[-1], q.shape[1]
    if max(key_dim, value_dim) > DIMS[-1]:
        raise NotImplementedError(f"K = {key_dim}, V = {value_dim}; needs at most {DIMS[-1]}")
    if not isinstance(scale, (int, float)) or not scale > 0:
        raise NotImplementedError(f"scale {scale}; needs a positive number")
    keys, values = (next(size for size in DIMS if size >= dim) for dim in (key_dim, value_dim))
    tail = -length % CHUNK
    q, k, v = (_fill(x, (0, tail, 0, dim - x.shape[-1])) for x, dim in ((q, keys), (k, keys), (v, values)))
    log_decay = _fill(log_decay, (0, tail, 0))
    initial_state = _fill(initial_state, (0, 0, keys - key_dim, values - value_dim))
    if segment_ids is None and tail:
        segment_ids = jnp.zeros((q.shape[0], length), jnp.int32)
    if segment_ids is not None:
        segment_ids = _fill(segment_ids, (0, tail), -1)
    call = Call(float(scale), parts, interpret)
    out, state = _scalar_decay(call, q, k, v, log_decay, initial_state, segment_ids)
    return out[:, :length, :, :value_dim], state[:, :, :key_dim, :value_dim]


class Call(NamedTuple):
    scale: float
    parts: int | None
    interpret: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scalar_decay(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    sums = _sums(log_decay, segment_ids)
    return _scan(call, q, k, v, _forward_factors(sums, call.scale), initial_state)[:2]


def _forward(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    out, state = _scalar_decay(call, q, k, v, log_decay, initial_state, segment_ids)
    return (out, state), (q, k, v, log_decay, initial_state, segment_ids)


def _backward(call: Call, kept: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    q, k, v, log_decay, initial_state, segment_ids = kept
    d_out, d_state = cotangents
    sums = _sums(log_decay, segment_ids)
    ahead, back = _forward_factors(sums, call.scale), _reverse_factors(sums, call.scale)
    transposed = lambda s: jnp.swapaxes(s, 2, 3)  # noqa: E731
    dq, _, from_q = _scan(call, d_out, v, k, ahead, transposed(initial_state), q, keep_states=True)
    dk, _, from_k = _scan(call, v, d_out, q, back, transposed(d_state), k, from_q.states, reverse=True)
    dv, d_initial, _ = _scan(call, k, q, d_out, back, d_state, reverse=True)
    d_log_decay = _gate_gradient(
        from_q.inside + from_q.before - from_k.inside, from_k.before, from_k.overlap, sums, segment_ids
    )
    grouped = lambda dx, x: dx.reshape(*x.shape[:3], -1, x.shape[3]).sum(3) if dx.shape != x.shape else dx  # noqa: E731
    return grouped(dq, q), grouped(dk, k), grouped(dv, v), d_log_decay, d_initial, None


_scalar_decay.defvjp(_forward, _backward)


def _scan(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    factors: Factors,
    initial_state: jax.Array,
    x: jax.Array | None = None,
    others: jax.Array | None = None,
    *,
    reverse: bool = False,
    keep_states: bool = False,
) -> tuple[jax.Array, jax.Array, Extras]:
    """`scan_in_parts`, whose rows take the axes of `vmap` in."""

    @jax.custom_batching.custom_vmap
    def run(*arrays: Any) -> Any:
        return scan_in_parts(
            *arrays, parts=call.parts, reverse=reverse, keep_states=keep_states, interpret=call.interpret
        )

    @run.def_vmap
    def over(size: int, batched: Any, *arrays: Any) -> Any:
        def rows(array: jax.Array, is_batched: bool) -> jax.Array:
            array = array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        out = run(*jax.tree.map(rows, arrays, tuple(batched)))
        split = jax.tree.map(lambda y: y.reshape(size, -1, *y.shape[1:]), out)
        return split, jax.tree.map(lambda _: True, split)

    return run(q, k, v, factors, initial_state, x, others)


class Sums(NamedTuple):
    """Of the gates of a chunk [B, H, N, C]: g_1 + ... + g_i and g_{i+1} + ... + g_C; which tokens are there."""

    prefix: jax.Array
    suffix: jax.Array
    real: jax.Array


def _sums(log_decay: jax.Array, segment_ids: jax.Array | None) -> Sums:
    real = jnp.ones(log_decay.shape[:2], bool) if segment_ids is None else segment_ids >= 0
    if segment_ids is not None:
        log_decay = jnp.where(_starts(segment_ids)[..., None], BOUNDARY, jnp.where(real[..., None], log_decay, 0))
    batch, length, _ = log_decay.shape
    chunks = lambda x: jnp.moveaxis(x, 1, 2).reshape(batch, -1, length // CHUNK, CHUNK)  # noqa: E731
    gates = chunks(log_decay)
    after = jnp.concatenate([gates[..., 1:], jnp.zeros_like(gates[..., :1])], -1)
    suffix = jax.lax.cumsum(after, 3, reverse=True)
    return Sums(jnp.cumsum(gates, -1), suffix, jnp.broadcast_to(chunks(real[..., None]), gates.shape))


def _starts(segment_ids: jax.Array) -> jax.Array:
    """The first token of every document but the first of its row."""
    before = jnp.pad(jax.lax.cummax(segment_ids, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return (segment_ids >= 0) & (before >= 0) & (segment_ids != before)


def _forward_factors(sums: Sums, scale: float) -> Factors:
    """Token i reads with the scale what tokens j <= i have written."""
    return _factors(sums, sums.prefix + math.log(scale), -sums.prefix, sums.prefix + math.log(scale), sums.suffix)


def _reverse_factors(sums: Sums, scale: float) -> Factors:
    """Token j reads what tokens i >= j write with the scale."""
    return _factors(sums, -sums.prefix, sums.prefix + math.log(scale), sums.suffix, sums.prefix + math.log(scale))


def _factors(sums: Sums, a: jax.Array, b: jax.Array, r: jax.Array, w: jax.Array) -> Factors:
    exponent = lambda x: jnp.where(sums.real, x * LOG2E, NOTHING)  # noqa: E731
    decay = lambda x: jnp.where(sums.real, jnp.exp(x), 0)  # noqa: E731
    keep = jnp.broadcast_to(jnp.exp(sums.prefix[..., -1:]), a.shape)
    return Factors(exponent(a), exponent(b), decay(r), decay(w), keep)


def _gate_gradient(
    after: jax.Array, before: jax.Array, overlap: jax.Array, sums: Sums, segment_ids: jax.Array | None
) -> jax.Array:
    """[B, T, H]: of each token the sum of `after` from it to the end of its chunk, of `before` up to it, and what the
    chunk keeps of `overlap`; nothing comes from another document."""
    batch, heads, chunks, size = sums.prefix.shape
    after, before = (x.reshape(sums.prefix.shape) for x in (after, before))
    if segment_ids is None:
        inner = jax.lax.cumsum(after, 3, reverse=True) + jnp.cumsum(before, 3) - before
    else:
        ids = segment_ids.reshape(batch, chunks, size)
        same = (ids[..., :, None] == ids[..., None, :])[:, None]
        upper = jnp.triu(jnp.ones((size, size), bool))
        total = lambda mask, x: jnp.sum(jnp.where(same & mask, x[..., None, :], 0), -1)  # noqa: E731
        inner = total(upper, after) + total(~upper, before)
    inner = inner + (jnp.exp(sums.prefix[..., -1]) * overlap)[..., None]
    gradient = jnp.moveaxis(inner.reshape(batch, heads, -1), 1, 2)
    if segment_ids is None:
        return gradient
    return jnp.where(((segment_ids < 0) | _starts(segment_ids))[..., None], 0, gradient)


def _fill(x: jax.Array, tails: tuple[int, ...], value: float = 0) -> jax.Array:
    if not any(tails):
        return x
    return jnp.pad(x, [(0, tail) for tail in tails], constant_values=value)
