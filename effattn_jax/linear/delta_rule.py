"""Delta rule: a matrix memory that forgets, then replaces what it holds under a key.

    S <- diag(e^{g_t}) S_{t-1}        S_t = S + beta_t k_t (v_t - S^T k_t)^T        o_t = scale * S_t^T q_t

The core of Fast Weight Programmers (Schlag et al. 2021, arXiv:2102.11174), DeltaNet (Yang et al. 2024,
arXiv:2406.06484), Gated DeltaNet (g a number per head; Yang et al. 2024, arXiv:2412.06464), DeltaProduct (Siems et al.
2025, arXiv:2502.10297) and Kimi Delta Attention (g a number per channel; Kimi Team 2025, arXiv:2510.26692).
"""

import functools

import jax
import jax.numpy as jnp

from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.linear.affine import DenseMap, dense_map
from effattn_jax.linear.arguments import FORMS, check_gate, check_memory, choose_form, repeat_heads, start_state
from effattn_jax.linear.chunk_decay import ChunkDecay, chunk_decay, split_heads
from effattn_jax.linear.chunks import from_chunks
from effattn_jax.linear.low_rank_map import LowRankMap, states_between
from effattn_jax.linear.recurrence import recurrence
from effattn_jax.linear.triangular import unit_lower_inverse
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.typing import Array, Float, Keys, MatrixState, Queries, SegmentIds, Values

__all__ = ["FORMS", "delta_rule", "delta_rule_map"]


def delta_rule(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    scale: float | None = None,
    initial_state: MatrixState | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Values, MatrixState]:
    """S <- diag(e^{g_t}) S; S_t = S + beta_t k_t (v_t - S^T k_t)^T and o_t = scale * S_t^T q_t, for every head.

    The error v - S^T k is that of the decayed memory. Keys of norm 1 with beta in [0, 2] keep the memory bounded:
    beta = 1 stores v under k exactly, beta = 2 reflects along k.

    Heads: H is the largest head count among q, k and v; the others may have fewer that divide H, each serving
    consecutive heads.

    Args:
      q: [B, T, H, K] queries.
      k: [B, T, H, K] keys.
      v: [B, T, H, V] values; V may differ from K.
      beta: [B, T, H], how much of the error is corrected.
      log_decay: g, the natural logarithm of the decay, <= 0. None (no decay), [B, T, H] or [B, T, H, K].
      scale: factor on the queries; None means K**-0.5.
      initial_state: [B, H, K, V], the memory of the first document of each row; None means zeros.
      segment_ids: [B, T] documents of packed rows, never decreasing along a row; memory does not cross documents.
        Negative ids mark padding: such a token writes nothing, reads zero and lets the state pass.
      form: "recurrent" (`lax.scan` over tokens), "parallel" (quadratic in T), "chunkwise" (matrix products over chunks,
        a scan over chunks), "associative" (the same, chunks combined by `lax.associative_scan`): algorithms for one
        answer. None takes the single step for T = 1, else chunkwise.
      implementation: where it runs, see `effattn_jax.dispatch`; "xla" is there.

    Returns:
      out [B, T, H, V] in q's dtype and the final state [B, H, K, V] in float32 (float64 for float64 inputs).
      Every form keeps for the backward pass a memory linear in T with states per chunk, never per token (the parallel
      form keeps T^2 scores).

    Raises:
      ValueError: shapes, dtypes, head counts, form or segment ids that do not fit.
    """
    heads = check_memory(q, k, v, initial_state, segment_ids, form)
    batch, length, _, key_dim = q.shape
    per_head = (batch, length, heads)
    check_gate("beta", beta, (per_head, "[B, T, H]"))
    accumulate = accumulation_dtype(q.dtype)
    gates = () if log_decay is None else (log_decay,)
    if log_decay is not None:
        check_gate("log_decay", log_decay, (per_head, "[B, T, H]"), ((*per_head, key_dim), "[B, T, H, K]"))
        log_decay = log_decay.astype(accumulate)
    out, state = dispatch(
        "delta_rule",
        {"xla": _xla},
        implementation,
        ("xla",),
        q,
        k,
        v,
        beta.astype(accumulate),
        log_decay,
        start_state(initial_state, (batch, heads, key_dim, v.shape[-1]), accumulate, q, k, v, beta, *gates),
        segment_ids,
        choose_form(form, length),
    )
    out = out * (key_dim**-0.5 if scale is None else scale)
    return out.astype(q.dtype), state


def _xla(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array | None,
    initial_state: Array,
    segment_ids: Array | None,
    form: str,
) -> tuple[Array, Array]:
    q, k, v = (repeat_heads(x, initial_state.shape[1]) for x in (q, k, v))
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    if form == "recurrent":
        q, k, v = (x.astype(initial_state.dtype) for x in (q, k, v))
        log_decay = jnp.zeros_like(beta[..., None]) if log_decay is None else log_decay
        return recurrent(q, k, v, beta, log_decay, initial_state, segment_ids)
    if form == "parallel":
        return parallel(q, k, v, beta, log_decay, initial_state, segment_ids)
    chunks = functools.partial(chunkwise, associative=form == "associative")
    return jax.checkpoint(chunks)(q, k, v, beta, log_decay, initial_state, segment_ids)


def delta_rule_map(
    k: Keys,
    v: Values,
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    segment_ids: SegmentIds | None = None,
) -> DenseMap:
    """What these tokens do to the state before them, S -> P S + R: R is their final state.

    P = (I - beta_T k_T k_T^T) diag(e^{g_T}) ... (I - beta_1 k_1 k_1^T) diag(e^{g_1}); it is 0 where a document ends
    among the tokens.
    """

    def final_state(state: Array, write: bool) -> Array:
        values = v if write else jnp.zeros_like(v, shape=(*v.shape[:3], k.shape[-1]))
        queries = jnp.zeros_like(k)
        return delta_rule(queries, k, values, beta, log_decay, initial_state=state, segment_ids=segment_ids)[1]

    return dense_map(final_state, k, max(k.shape[2], v.shape[2]), k.shape[-1], v.shape[-1])


def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H 1|K"],
    initial_state: MatrixState,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T H V"], MatrixState]:
    """The equation, token by token."""

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, beta, g = token
        state = jnp.exp(g)[:, :, :, None] * state
        error = v - contract("bhkv,bhk->bhv", state, k)
        state = state + k[:, :, :, None] * (beta[:, :, None] * error)[:, :, None, :]
        return state, contract("bhkv,bhk->bhv", state, q)

    return recurrence(step, initial_state, (q, k, v, beta, log_decay), segment_ids)


def parallel(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H 1|K"] | None,
    initial_state: MatrixState,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T H V"], MatrixState]:
    """The whole row is one chunk: a triangular system of T x T."""
    return chunkwise(q, k, v, beta, log_decay, initial_state, segment_ids, chunk=max(1, q.shape[1]))


def chunkwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H 1|K"] | None,
    initial_state: MatrixState,
    segment_ids: SegmentIds | None,
    chunk: int = 64,
    associative: bool = False,
) -> tuple[Float[Array, "B T H V"], MatrixState]:
    """In a chunk that starts from S with G_i = g_1 + ... + g_i, every exponent <= 0:

    A = (I + diag(beta) tril(K K^T * D, -1))^{-1} diag(beta)        D_ij = e^{G_i - G_j}, per channel inside K K^T
    X = A (V - (e^G K) S)                   row i is beta_i (v_i - S_i^T k_i), what token i writes under k_i
    O = (e^G Q) S + tril(Q K^T * D) X
    S' = e^{G_C} S + (e^{G_C - G} K)^T X

    `delta_rule` calls it under `jax.checkpoint`: the backward pass keeps the arguments and recomputes the rest.
    """
    length, dtype = q.shape[1], v.dtype
    decay = chunk_decay(log_decay, segment_ids, chunk)
    q, k, v, beta = (split_heads(x, chunk) for x in (q, k, v, beta))  # [B, N, H, C, ...]
    [kk], [qk] = decay.scores([k], after=[k, q])
    maps = chunk_maps(k, v, beta, kk, decay)
    entering, writes, state = states_between(maps, initial_state, associative=associative)
    read = contract("...ck,...kv->...cv", (q * decay.into).astype(dtype), entering.astype(dtype))
    read = read + contract("...ij,...jv->...iv", qk.astype(dtype), writes.astype(dtype))
    return from_chunks(jnp.moveaxis(read, 2, 3), length), state


def chunk_maps(
    k: Float[Array, "B N H C K"],
    v: Float[Array, "B N H C V"],
    beta: Float[Array, "B N H C"],
    kk: Float[Array, "B N H C C"],
    decay: ChunkDecay,
) -> LowRankMap:
    """What each chunk does to the state that enters it; X is its inner value."""
    into, out = ((k * x).astype(v.dtype) for x in (decay.into, decay.out))
    solve = unit_lower_inverse(beta[..., None] * kk) * beta[..., None, :]
    values = contract("...ij,...jv->...iv", solve.astype(v.dtype), v)
    erase = contract("...ij,...jk->...ik", solve.astype(v.dtype), into)
    return LowRankMap(decay.keep, out, -erase.astype(v.dtype), values)
