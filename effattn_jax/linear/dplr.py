"""DPLR: a matrix memory whose transition is diagonal plus low rank, here a free matrix of rank 1 per token.

    S_t = diag(e^{g_t}) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T        o_t = scale * S_t^T q_t

The core of RWKV-7 (a = -kappa, b = kappa * iclr for a unit kappa, scale 1; Peng et al. 2025, arXiv:2503.14456) and of
Comba (a = -p, b = beta k, v = beta v; Hu et al. 2025, arXiv:2506.02475). The delta rule is a = -e^g k, b = beta k,
v = beta v: a reads the memory before it decays.
"""

import functools

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.linear.affine import DenseMap, dense_map
from effattn_jax.linear.arguments import FORMS, check_gate, check_memory, choose_form, repeat_heads, start_state
from effattn_jax.linear.chunk_decay import chunk_decay, split_heads
from effattn_jax.linear.chunks import from_chunks
from effattn_jax.linear.low_rank_map import LowRankMap, states_between
from effattn_jax.linear.recurrence import recurrence
from effattn_jax.linear.triangular import unit_lower_inverse
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.typing import Array, Float, Keys, MatrixState, Queries, SegmentIds, Values

__all__ = ["FORMS", "dplr", "dplr_map"]


def dplr(
    q: Queries,
    k: Keys,
    v: Values,
    a: Keys,
    b: Keys,
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"],
    *,
    scale: float | None = None,
    initial_state: MatrixState | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Values, MatrixState]:
    """S_t = diag(e^{g_t}) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T and o_t = scale * S_t^T q_t, for every head.

    Arbitrary a and b can make the memory grow without bound; it is the caller's part to keep diag(e^g) + b a^T from
    expanding.

    Heads: H is the largest head count among q, k and v; the others, a and b may have fewer that divide H, each serving
    consecutive heads.

    Args:
      q: [B, T, H, K] queries.
      k: [B, T, H, K] keys.
      v: [B, T, H, V] values; V may differ from K.
      a: [B, T, H, K], what is read from the memory before it decays.
      b: [B, T, H, K], where that is written to.
      log_decay: g, the natural logarithm of the decay, <= 0. [B, T, H, K], or [B, T, H] where all channels are alike.
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
    for name, x in (("a", a), ("b", b)):
        checks.check_shape(name, x, (batch, length, None, key_dim), "[B, T, H, K]")
        checks.check_floating(name, x)
        checks.check_head_groups(name, x.shape[2], "q, k and v", heads)
    check_gate("log_decay", log_decay, (per_head, "[B, T, H]"), ((*per_head, key_dim), "[B, T, H, K]"))
    accumulate = accumulation_dtype(q.dtype)
    out, state = dispatch(
        "dplr",
        {"xla": _xla},
        implementation,
        ("xla",),
        q,
        k,
        v,
        a,
        b,
        log_decay.astype(accumulate),
        start_state(initial_state, (batch, heads, key_dim, v.shape[-1]), accumulate, q, k, v, a, b, log_decay),
        segment_ids,
        choose_form(form, length),
    )
    out = out * (key_dim**-0.5 if scale is None else scale)
    return out.astype(q.dtype), state


def _xla(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    log_decay: Array,
    initial_state: Array,
    segment_ids: Array | None,
    form: str,
) -> tuple[Array, Array]:
    q, k, v, a, b = (repeat_heads(x, initial_state.shape[1]) for x in (q, k, v, a, b))
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    if form == "recurrent":
        q, k, v, a, b = (x.astype(initial_state.dtype) for x in (q, k, v, a, b))
        return recurrent(q, k, v, a, b, log_decay, initial_state, segment_ids)
    if form == "parallel":
        return parallel(q, k, v, a, b, log_decay, initial_state, segment_ids)
    chunks = functools.partial(chunkwise, associative=form == "associative")
    return jax.checkpoint(chunks)(q, k, v, a, b, log_decay, initial_state, segment_ids)


def dplr_map(
    k: Keys,
    v: Values,
    a: Keys,
    b: Keys,
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"],
    *,
    segment_ids: SegmentIds | None = None,
) -> DenseMap:
    """What these tokens do to the state before them, S -> P S + R: R is their final state.

    P = (diag(e^{g_T}) + b_T a_T^T) ... (diag(e^{g_1}) + b_1 a_1^T); it is 0 where a document ends among the tokens.
    """

    def final_state(state: Array, write: bool) -> Array:
        values = v if write else jnp.zeros_like(v, shape=(*v.shape[:3], k.shape[-1]))
        queries = jnp.zeros_like(k)
        return dplr(queries, k, values, a, b, log_decay, initial_state=state, segment_ids=segment_ids)[1]

    return dense_map(final_state, k, max(k.shape[2], v.shape[2]), k.shape[-1], v.shape[-1])


def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H 1|K"],
    initial_state: MatrixState,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T H V"], MatrixState]:
    """The equation, token by token."""

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, a, b, g = token
        read = contract("bhkv,bhk->bhv", state, a)
        state = jnp.exp(g)[:, :, :, None] * state + _outer(b, read) + _outer(k, v)
        return state, contract("bhkv,bhk->bhv", state, q)

    return recurrence(step, initial_state, (q, k, v, a, b, log_decay), segment_ids)


def _outer(k: Float[Array, "B H K"], v: Float[Array, "B H V"]) -> Float[Array, "B H K V"]:
    return k[:, :, :, None] * v[:, :, None, :]


def parallel(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H 1|K"],
    initial_state: MatrixState,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T H V"], MatrixState]:
    """The whole row is one chunk: a triangular system of T x T."""
    return chunkwise(q, k, v, a, b, log_decay, initial_state, segment_ids, chunk=max(1, q.shape[1]))


def chunkwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H 1|K"],
    initial_state: MatrixState,
    segment_ids: SegmentIds | None,
    chunk: int = 64,
    associative: bool = False,
) -> tuple[Float[Array, "B T H V"], MatrixState]:
    """In a chunk that starts from S with G_i = g_1 + ... + g_i and E_i = G_i - g_i, every exponent <= 0:

    D_ij = e^{G_i - G_j}, D'_ij = e^{E_i - G_j}, per channel inside the products
    R = (I - tril(A B^T * D', -1))^{-1} (tril(A K^T * D', -1) V + (e^E A) S)        row i is a_i^T S_{i-1}
    O = (e^G Q) S + tril(Q K^T * D) V + tril(Q B^T * D) R
    S' = e^{G_C} S + (e^{G_C - G} K)^T V + (e^{G_C - G} B)^T R

    `dplr` calls it under `jax.checkpoint`: the backward pass keeps the arguments and recomputes the rest.
    """
    length, dtype = q.shape[1], v.dtype
    decay = chunk_decay(log_decay, segment_ids, chunk)
    q, k, v, a, b = (split_heads(x, chunk) for x in (q, k, v, a, b))  # [B, N, H, C, ...]
    q_into, a_into = (q * decay.into).astype(dtype), (a * decay.into_before).astype(dtype)
    k_out, b_out = (k * decay.out).astype(dtype), (b * decay.out).astype(dtype)
    (qk, qb), (ak, ab) = decay.scores([k, b], after=[q], before=[a])
    solve = unit_lower_inverse(-ab).astype(dtype)
    read_before = contract("...ij,...jk->...ik", solve, a_into).astype(dtype)
    reads = contract("...ij,...jv->...iv", ak.astype(dtype), v)
    reads = contract("...ij,...jv->...iv", solve, reads.astype(dtype))
    maps = LowRankMap(decay.keep, b_out, read_before, reads, contract("...ck,...cv->...kv", k_out, v))
    entering, reads, state = states_between(maps, initial_state, associative=associative)
    out = contract("...ck,...kv->...cv", q_into, entering.astype(dtype))
    out = out + contract("...ij,...jv->...iv", qk.astype(dtype), v)
    out = out + contract("...ij,...jv->...iv", qb.astype(dtype), reads.astype(dtype))
    return from_chunks(jnp.moveaxis(out, 2, 3), length), state
