"""Vector decay on Hopper GPUs, forward and backward, reading after the write or, with a bonus, before it.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T

    o_t = scale S_t^T q_t                                         read after the write
    o_t = scale (S_{t-1}^T q_t + (q_t . (u k_t)) v_t)             read before it, with a bonus u for the token itself

Passes, all over chunks of 64 tokens:

    forward    `vector_scores`     scores, decayed queries and keys of all chunks side by side
               `memory_scan`       the state from chunk to chunk, and the outputs
    backward   `vector_scores`     again, nothing but the inputs is kept
               `memory_scan`       the states that enter the chunks
               `memory_scan`       in reverse: dv, and the gradients of the states
               `vector_gradients`  dq, dk and the gradient of the gates of all chunks side by side

Only the scans go through a row in order, and they make no exponentials. What a fused kernel would not move: decayed
queries and keys and the scores, 0.6 KB a token and head at K = 128, beside the 1.5 KB of q, k, v, o and gates.

Floors, B4 T8192 H16 K = V = 128 at 4.25 TB/s: 0.16 ms forward and 0.44 with the backward pass for inputs and outputs
once; 0.34 and 1.3 ms for the passes above, each of whose modules has its own count. Measured on an H200: 0.655 ms
forward and 2.147 with the backward pass, 0.713 and 2.473 with a bonus. An earlier form took 0.816 and 3.289 on an H100
(2.9 TB/s): 0.556 for scores, 0.285 for the forward scan, 0.268 and 0.441 for those of the backward pass, 1.483 for the
gradients.

Documents: pairs of different documents are masked, queries that nothing reaches and keys that reach nothing too, so
that gates need not be anything in particular where a document starts.

Yang et al. 2023, arXiv:2312.06635 (GLA, secondary chunks); Peng et al. 2024, arXiv:2404.05892 (RWKV-6).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.memory_scan import CHUNK, memory_scan_in_parts
from pallas_kernels.mosaic_gpu.rows import fold_rows
from pallas_kernels.mosaic_gpu.vector_gradients import vector_gradients
from pallas_kernels.mosaic_gpu.vector_scores import vector_scores

DIMS = (64, 128, 256)  # of q, k and v; others are filled up with zeros


def vector_decay(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    *,
    bonus: jax.Array | None = None,
    scale: float,
    parts: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The equations above for every head: out [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32.

    Differentiable once, in all arrays of floats.

    Args:
      q, k: [B, T, heads, K], v: [B, T, heads, V] in bfloat16 or float16; heads divide H, each serves consecutive ones.
      log_decay: [B, T, H, K], float32, <= 0.
      initial_state: [B, H, K, V], float32: the memory of the first document of each row.
      segment_ids: [B, T], documents of packed rows, never decreasing along a row but for negative ids, which mark
        padding: such a token writes nothing, reads zero and lets the state pass.
      bonus: u [H, K], float32.
      scale: on the queries, a static number.
      parts: how many each row is cut into for the scans; None: as many as fill the chip.
      interpret: parameters of the interpreter that runs the kernel on a CPU.

    Raises:
      NotImplementedError: other dtypes, K or V above 256, a scale that is no number.
    """
    if v.dtype not in (jnp.bfloat16, jnp.float16) or q.dtype != v.dtype or k.dtype != v.dtype:
        raise NotImplementedError(f"q, k, v of {q.dtype}, {k.dtype}, {v.dtype}; needs one of bfloat16, float16")
    key_dim, value_dim, length = q.shape[-1], v.shape[-1], q.shape[1]
    if max(key_dim, value_dim) > DIMS[-1]:
        raise NotImplementedError(f"K = {key_dim}, V = {value_dim}; needs at most {DIMS[-1]}")
    if not isinstance(scale, (int, float)):
        raise NotImplementedError(f"scale {scale}; needs a number that is known when the call is traced")
    keys, values = (next(size for size in DIMS if size >= dim) for dim in (key_dim, value_dim))
    tail = -length % CHUNK
    documents = None
    if segment_ids is not None:
        real = segment_ids >= 0
        documents = _documents(_fill(segment_ids, (0, tail), -1))
        q, k, v, log_decay = (jnp.where(real.reshape(*real.shape, 1, 1), x, 0) for x in (q, k, v, log_decay))
    wide = lambda x, to: _fill(x, (0, tail, 0, to - x.shape[-1]))  # noqa: E731
    q, k, v, log_decay = wide(q, keys), wide(k, keys), wide(v, values), wide(log_decay, keys)
    bonus = None if bonus is None else _fill(bonus, (0, keys - key_dim))
    initial_state = _fill(initial_state, (0, 0, keys - key_dim, values - value_dim))
    call = Call(float(scale), parts, interpret)
    out, state = _vector_decay(call, q, k, v, log_decay, bonus, initial_state, documents)
    return out[:, :length, :, :value_dim], state[:, :, :key_dim, :value_dim]


class Call(NamedTuple):
    scale: float
    parts: int | None
    interpret: Any


@functools.partial(jax.jit, static_argnums=0)
def _scores(call: Call, *arrays: Any) -> Any:
    """`vector_scores`; the same computation forward and backward, so that one kernel is compiled."""
    return vector_scores(*arrays, scale=call.scale, interpret=call.interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vector_decay(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array | None,
    initial_state: jax.Array,
    documents: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    def run(q: Any, k: Any, v: Any, log_decay: Any, bonus: Any, initial_state: Any, documents: Any) -> Any:
        scores, reads, writes, keep = _scores(call, q, k, log_decay, bonus, documents)
        scan = functools.partial(memory_scan_in_parts, parts=call.parts, interpret=call.interpret)
        return scan(reads, writes, v, scores, keep, initial_state)[:2]

    return fold_rows(run, (0, 0, 0, 0, None, 0, 0))(q, k, v, log_decay, bonus, initial_state, documents)


def _forward(call: Call, *arrays: Any) -> tuple[Any, Any]:
    return _vector_decay(call, *arrays), arrays


def _backward(call: Call, arrays: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    def run(
        q: Any, k: Any, v: Any, log_decay: Any, bonus: Any, initial_state: Any, documents: Any, d_out: Any, d_state: Any
    ) -> Any:
        scores, reads, writes, keep = _scores(call, q, k, log_decay, bonus, documents)
        scan = functools.partial(memory_scan_in_parts, parts=call.parts, interpret=call.interpret, keep_states=True)
        _, _, states = scan(None, writes, v, None, keep, initial_state)
        dv, d_initial, d_states = scan(writes, reads, d_out, scores, keep, d_state, reverse=True)
        assert states is not None
        assert d_states is not None
        dq, dk, d_gates, d_bonus = vector_gradients(
            q,
            k,
            v,
            log_decay,
            bonus,
            documents,
            d_out,
            states,
            d_states,
            keep,
            scale=call.scale,
            interpret=call.interpret,
        )
        grouped = lambda dx, x: dx.reshape(*x.shape[:3], -1, x.shape[3]).sum(3) if dx.shape != x.shape else dx  # noqa: E731
        dq, dk, dv = grouped(dq, q), grouped(dk, k), grouped(dv, v)
        return dq, dk, dv, d_gates, None if d_bonus is None else jnp.sum(d_bonus, 2), d_initial

    gradients = fold_rows(run, (0, 0, 0, 0, None, 0, 0, 0, 0))(*arrays, *cotangents)
    dq, dk, dv, d_gates, d_bonus, d_initial = gradients
    return dq, dk, dv, d_gates, None if d_bonus is None else jnp.sum(d_bonus, 0), d_initial, None


_vector_decay.defvjp(_forward, _backward)


def _documents(segment_ids: jax.Array) -> jax.Array:
    """[B, N, 5, 64] as `vector_scores` takes them: first and end in, into, out of and through each chunk."""
    ids = jnp.maximum(jax.lax.cummax(segment_ids, axis=1), -1)
    starts = (ids[:, 1:] != ids[:, :-1]) & (ids[:, :-1] >= 0)  # padding before the first document is part of it
    number = jnp.pad(jnp.cumsum(starts, 1, dtype=jnp.int32), ((0, 0), (1, 0)))
    number = number.reshape(ids.shape[0], -1, CHUNK)
    first = jnp.pad(number[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))  # the document that enters the chunk
    last = number[:, :, -1:]
    through = jnp.broadcast_to(first == last, number.shape)
    same = number[..., :, None] == number[..., None, :]
    start = jnp.argmax(same, -1)
    rows = [start, start + jnp.sum(same, -1), number == first, number == last, through]
    return jnp.stack(rows, 2).astype(jnp.float32)


def _fill(x: jax.Array, tails: tuple[int, ...], value: float = 0) -> jax.Array:
    if not any(tails):
        return x
    return jnp.pad(x, [(0, tail) for tail in tails], constant_values=value)
