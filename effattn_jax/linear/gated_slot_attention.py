"""Gated slot attention: softmax attention over M slots, a memory of keys and one of values that forget slot by slot
(Zhang et al. 2024, arXiv:2409.07146).

    K_t = diag(e^{g_t}) K_{t-1} + s_t k_t^T        V_t = diag(e^{g_t}) V_{t-1} + s_t v_t^T
    o_t = V_t^T softmax(scale * K_t q_t)

Both memories are vector decays with s in the place of keys.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.linear.affine import DiagonalMap
from effattn_jax.linear.arguments import FORMS, check_gate, check_memory, choose_form, repeat_heads, start_state
from effattn_jax.linear.recurrence import recurrence
from effattn_jax.linear.vector_decay import chunkwise as vector_decay_chunks
from effattn_jax.linear.vector_decay import vector_decay_map
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.typing import Array, Float, Keys, Queries, SegmentIds, Values

__all__ = ["FORMS", "SlotState", "gated_slot_attention", "gated_slot_map"]


class SlotState(NamedTuple):
    """What is in the slots: keys, and values; float32."""

    keys: Float[Array, "B H M K"]
    values: Float[Array, "B H M V"]


def gated_slot_attention(
    q: Queries,
    k: Keys,
    v: Values,
    s: Float[Array, "B T H M"],
    log_decay: Float[Array, "B T H M"],
    *,
    scale: float | None = None,
    initial_state: SlotState | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Values, SlotState]:
    """o_t = V_t^T softmax(scale * K_t q_t) with M slots of keys K and of values V, for every head.

    Args:
      q: [B, T, H, K] queries.
      k: [B, T, H, K] keys.
      v: [B, T, H, V] values; q, k and v may have fewer heads that divide H.
      s: [B, T, H, M], how much of a token is written to each slot; 1 - e^g in the paper.
      log_decay: g [B, T, H, M], the natural logarithm of the decay of each slot, <= 0.
      scale: factor on the queries; None means K**-0.5.
      initial_state: the slots of the first document of each row; None means zeros.
      segment_ids: [B, T] documents of packed rows, never decreasing along a row; memory does not cross documents.
        Negative ids mark padding: such a token writes nothing, reads zero and lets the state pass.
      form: "recurrent" (token by token), "parallel" (the row is one chunk), "chunkwise", "associative" (chunks combined
        by `lax.associative_scan`); None takes the single step for T = 1, else chunkwise.
      implementation: where it runs, see `effattn_jax.dispatch`; "xla" is there.

    Returns:
      out [B, T, H, V] in q's dtype and the final state. What the softmax is taken of is computed in float32.

    Raises:
      ValueError: shapes, dtypes, head counts, form or segment ids that do not fit.
    """
    check_memory(q, k, v, None, segment_ids, form)
    batch, length, _, key_dim = q.shape
    heads = max(x.shape[2] for x in (q, k, v))
    checks.check_shape("s", s, (batch, length, heads, None), "[B, T, H, M]")
    checks.check_floating("s", s)
    slots = s.shape[3]
    if not slots:
        checks.fail("s", f"shape {s.shape}", "at least one slot in [B, T, H, M]")
    check_gate("log_decay", log_decay, ((batch, length, heads, slots), "[B, T, H, M]"))
    accumulate = accumulation_dtype(q.dtype)
    start = {}
    for name, width in (("keys", key_dim), ("values", v.shape[-1])):
        part, shape = getattr(initial_state, name, None), (batch, heads, slots, width)
        if part is not None:
            checks.check_shape(f"initial_state.{name}", part, shape, "[B, H, M, K or V]")
            checks.check_floating(f"initial_state.{name}", part)
        start[name] = start_state(part, shape, accumulate, q, k, v, s, log_decay)
    out, state = dispatch(
        "gated_slot_attention",
        {"xla": _xla},
        implementation,
        ("xla",),
        repeat_heads(q.astype(accumulate), heads) * (key_dim**-0.5 if scale is None else scale),
        repeat_heads(k.astype(accumulate), heads),
        repeat_heads(v, heads),
        s.astype(accumulate),
        log_decay.astype(accumulate),
        SlotState(**start),
        segment_ids,
        choose_form(form, length),
    )
    return out.astype(q.dtype), state


def _xla(
    q: Array,
    k: Array,
    v: Array,
    s: Array,
    log_decay: Array,
    state: SlotState,
    segment_ids: Array | None,
    form: str,
) -> tuple[Array, SlotState]:
    if form == "recurrent":
        return recurrent(q, k, v.astype(q.dtype), s, log_decay, state, segment_ids)
    chunks = functools.partial(
        chunkwise,
        chunk=max(1, q.shape[1]) if form == "parallel" else None,
        associative=form == "associative",
    )
    return jax.checkpoint(chunks)(q, k, v, s, log_decay, state, segment_ids)


def gated_slot_map(
    k: Keys,
    v: Values,
    s: Float[Array, "B T H M"],
    log_decay: Float[Array, "B T H M"],
    *,
    segment_ids: SegmentIds | None = None,
) -> DiagonalMap:
    """What these tokens do to the slots [K | V], [B, H, M, K + V], S -> P S + R: that of the vector decay."""
    k, v = (repeat_heads(x, s.shape[2]) for x in (k, v))
    return vector_decay_map(s, jnp.concatenate([k, v], -1), log_decay, segment_ids=segment_ids)


def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    s: Float[Array, "B T H M"],
    log_decay: Float[Array, "B T H M"],
    initial_state: SlotState,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T H V"], SlotState]:
    """The equation, token by token."""

    def step(state: SlotState, token: tuple[Array, ...]) -> tuple[SlotState, Array]:
        (keys, values), (q, k, v, s, g) = state, token
        decay, write = jnp.exp(g)[..., None], s[..., None]
        keys = decay * keys + write * k[:, :, None, :]
        values = decay * values + write * v[:, :, None, :]
        weights = jax.nn.softmax(contract("bhmk,bhk->bhm", keys, q))
        return SlotState(keys, values), contract("bhm,bhmv->bhv", weights, values)

    return recurrence(step, initial_state, (q, k, v, s, log_decay), segment_ids)


def chunkwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    s: Float[Array, "B T H M"],
    log_decay: Float[Array, "B T H M"],
    initial_state: SlotState,
    segment_ids: SegmentIds | None,
    chunk: int | None = None,
    associative: bool = False,
) -> tuple[Float[Array, "B T H V"], SlotState]:
    """Vector decay reads S^T r with r over the slots; K q is the transpose of that read, linear in r, applied to q. The
    values are read by the softmax of it as by any queries.
    """
    read = functools.partial(vector_decay_chunks, bonus=None, chunk=chunk, associative=associative)

    def read_keys(r: Array) -> tuple[Array, Array]:
        return read(r, s, k, log_decay, initial_state=initial_state.keys, segment_ids=segment_ids)

    _, transpose, keys = jax.vjp(read_keys, jnp.zeros_like(s), has_aux=True)
    (logits,) = transpose(q)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    out, values = read(
        weights, s.astype(v.dtype), v, log_decay, initial_state=initial_state.values, segment_ids=segment_ids
    )
    return out, SlotState(keys, values)
