"""Scalar decay for K and V up to 128: the forward pass is one `scan`, dq, dk and dv are three more.

    dq_i = scale sum_{j <= i} e^{G_i - G_j} (do_i . v_j) k_j     what a memory of v with the values k answers to do
    dk_j = scale sum_{i >= j} e^{G_i - G_j} (v_j . do_i) q_i
    dv_j = scale sum_{i >= j} e^{G_i - G_j} (k_j . q_i) do_i     its last state is dS_0

The gradient of a gate, in a chunk that state S enters and dS' leaves backwards, is made of dots of the float32 results
before they are rounded:

    dg_t = sum_{i >= t} (q_i . dq_i - k_i . (dk_i inside the chunk))
         + sum_{j < t} k_j . (dk_j from dS') + e^{G_C} <S, dS'>

where all that cancels was rounded alike (with sums over the whole row, gates of -4 lose 30 % of their gradient to the
rounding of states). For the last term alone the scan of dq leaves its states in memory, 2 K V bytes a chunk.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.gate_sums import Sums, gate_gradient, sums_of_gates
from pallas_kernels.mosaic_gpu.parts import scan_in_parts
from pallas_kernels.mosaic_gpu.scan import CHUNK, Factors

NOTHING = -1e30  # the exponent of a token that is not there
LOG2E = math.log2(math.e)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    *,
    scale: float,
    parts: int | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Out and the last state; T is a multiple of 64, K and V are 64 or 128."""
    factors = _forward_factors(sums_of_gates(log_decay, segment_ids, CHUNK), scale)
    scan = functools.partial(scan_in_parts, parts=parts, interpret=interpret)
    return scan(q, k, v, factors, initial_state)[:2]


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    d_out: jax.Array,
    d_state: jax.Array,
    *,
    scale: float,
    gates: bool,
    parts: int | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """dq, dk and dv of every head of the H, the gradient of the gates, if it is asked for, and dS_0."""
    scan = functools.partial(scan_in_parts, parts=parts, interpret=interpret)
    sums = sums_of_gates(log_decay, segment_ids, CHUNK)
    ahead, back = _forward_factors(sums, scale), _reverse_factors(sums, scale)
    transposed = lambda s: jnp.swapaxes(s, 2, 3)  # noqa: E731
    dots_q, dots_k = (q, k) if gates else (None, None)
    dq, _, from_q = scan(d_out, v, k, ahead, transposed(initial_state), dots_q, keep_states=gates)
    dk, _, from_k = scan(v, d_out, q, back, transposed(d_state), dots_k, from_q.states, reverse=True)
    dv, d_initial, _ = scan(k, q, d_out, back, d_state, reverse=True)
    d_log_decay = None
    if gates:
        after = from_q.inside + from_q.before - from_k.inside
        d_log_decay = gate_gradient(after, from_k.before, from_k.overlap, sums, segment_ids)
    return dq, dk, dv, d_log_decay, d_initial


def _forward_factors(sums: Sums, scale: float) -> Factors:
    """Token i reads with the scale what tokens j <= i have written."""
    return _factors(sums, sums.prefix + math.log(scale), -sums.prefix, sums.prefix + math.log(scale), sums.suffix)


def _reverse_factors(sums: Sums, scale: float) -> Factors:
    """Token j reads what tokens i >= j write with the scale."""
    return _factors(sums, -sums.prefix, sums.prefix + math.log(scale), sums.suffix, sums.prefix + math.log(scale))


def _factors(sums: Sums, a: jax.Array, b: jax.Array, r: jax.Array, w: jax.Array) -> Factors:
    there = lambda x, other: x if sums.real is None else jnp.where(sums.real, x, other)  # noqa: E731
    exponent = lambda x: there(x * LOG2E, NOTHING)  # noqa: E731
    decay = lambda x: there(jnp.exp(x), 0)  # noqa: E731
    keep = jnp.broadcast_to(jnp.exp(sums.prefix[..., -1:]), a.shape)
    return Factors(exponent(a), exponent(b), decay(r), decay(w), keep)
