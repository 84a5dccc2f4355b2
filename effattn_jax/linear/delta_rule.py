"""Delta rule: a matrix memory that forgets, then replaces what it holds under a key.

    S <- diag(e^{g_t}) S_{t-1}        S_t = S + beta_t k_t (v_t - S^T k_t)^T        o_t = scale * S_t^T q_t

The core of Fast Weight Programmers (Schlag et al. 2021, arXiv:2102.11174), DeltaNet (Yang et al. 2024,
arXiv:2406.06484), Gated DeltaNet (g a number per head; Yang et al. 2024, arXiv:2412.06464), DeltaProduct (Siems et al.
2025, arXiv:2502.10297) and Kimi Delta Attention (g a number per channel; Kimi Team 2025, arXiv:2510.26692).
"""

import jax.numpy as jnp

from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.linear.arguments import FORMS, check_gate, check_memory, choose_form, repeat_heads, start_state
from effattn_jax.linear.recurrence import recurrence
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.typing import Array, Float, Keys, MatrixState, Queries, SegmentIds, Values

__all__ = ["FORMS", "delta_rule"]


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
    if log_decay is None:
        log_decay = jnp.zeros(per_head, jnp.float32)
    check_gate("log_decay", log_decay, (per_head, "[B, T, H]"), ((*per_head, key_dim), "[B, T, H, K]"))
    accumulate = accumulation_dtype(q.dtype)
    out, state = dispatch(
        "delta_rule",
        {"xla": _xla},
        implementation,
        ("xla",),
        q,
        k,
        v,
        beta.astype(accumulate),
        log_decay.astype(accumulate),
        start_state(initial_state, (batch, heads, key_dim, v.shape[-1]), accumulate, q, k, v, beta, log_decay),
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
    log_decay: Array,
    initial_state: Array,
    segment_ids: Array | None,
    form: str,
) -> tuple[Array, Array]:
    q, k, v = (repeat_heads(x, initial_state.shape[1]) for x in (q, k, v))
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    q, k, v = (x.astype(initial_state.dtype) for x in (q, k, v))
    return recurrent(q, k, v, beta, log_decay, initial_state, segment_ids)


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
