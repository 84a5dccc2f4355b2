"""The mesa layer: a memory that answers with the least-squares fit of all it has seen (von Oswald et al. 2025,
arXiv:2506.05233).

    H_t = e^{g_t} H_{t-1} + beta_t k_t k_t^T        R_t = e^{g_t} R_{t-1} + beta_t k_t v_t^T
    o_t = R_t^T (H_t + diag(ridge))^-1 q_t

H and R are one scalar-decay memory [H | R] with keys k and values beta [k | v].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.linear.affine import DiagonalMap, entering_states
from effattn_jax.linear.arguments import FORMS, check_gate, check_memory, choose_form, repeat_heads, start_state
from effattn_jax.linear.chunk_decay import chunk_decay, split_heads
from effattn_jax.linear.chunks import from_chunks
from effattn_jax.linear.conjugate_gradients import solve_positive
from effattn_jax.linear.recurrence import recurrence
from effattn_jax.linear.scalar_decay import scalar_decay_map
from effattn_jax.precision import accumulation_dtype, contract, zeros_varying
from effattn_jax.typing import Array, Float, Keys, Queries, SegmentIds, Values

__all__ = ["FORMS", "MesaState", "mesa", "mesa_map"]


class MesaState(NamedTuple):
    """What the tokens so far say about keys, and about values given keys; float32."""

    h: Float[Array, "B H K K"]  # symmetric
    r: Float[Array, "B H K V"]


def mesa(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"],
    ridge: Float[Array, "H K"],
    *,
    iterations: int = 30,
    initial_state: MesaState | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Values, MesaState]:
    """o_t = R_t^T (H_t + diag(ridge))^-1 q_t, for every head.

    For a large ridge, ridge * o is gated linear attention. The systems are solved in float32 whatever the dtype; how
    many iterations they need grows with the root of (largest eigenvalue of H + ridge) / ridge, and keys of length one
    keep that small. Gradients are implicit, at the cost of one more solve; they too are as exact as the iterations.

    Args:
      q: [B, T, H, K] queries; the literature has them, and the keys, of length one.
      k: [B, T, H, K] keys.
      v: [B, T, H, V] values; q, k and v may have fewer heads that divide H.
      beta: [B, T, H], the weight of a token in the fit, >= 0.
      log_decay: g [B, T, H], the natural logarithm of the decay, <= 0.
      ridge: [H, K], > 0.
      iterations: of conjugate gradients; the recurrent form solves exactly.
      initial_state: the memory of the first document of each row; None means zeros. Of `h` the symmetric part counts.
      segment_ids: [B, T] documents of packed rows, never decreasing along a row; negative ids mark padding.
      form: "recurrent" (token by token), "parallel" (the row is one chunk), "chunkwise", "associative" (chunks combined
        by `lax.associative_scan`); None takes the single step for T = 1, else chunkwise.
      implementation: where it runs, see `effattn_jax.dispatch`; "xla" is there.

    Returns:
      out [B, T, H, V] in q's dtype and the final state.

    Raises:
      ValueError: shapes, dtypes, head counts, form, iterations or segment ids that do not fit.
    """
    check_memory(q, k, v, None, segment_ids, form)
    batch, length, _, key_dim = q.shape
    heads = max(x.shape[2] for x in (q, k, v))
    for name, gate in (("beta", beta), ("log_decay", log_decay)):
        check_gate(name, gate, ((batch, length, heads), "[B, T, H]"))
    check_gate("ridge", ridge, ((heads, key_dim), "[H, K]"))
    if iterations < 1:
        checks.fail("iterations", iterations, "at least 1")
    accumulate = accumulation_dtype(q.dtype)
    start = {}
    for name, width in (("h", key_dim), ("r", v.shape[-1])):
        part, shape = getattr(initial_state, name, None), (batch, heads, key_dim, width)
        if part is not None:
            checks.check_shape(f"initial_state.{name}", part, shape, "[B, H, K, K or V]")
            checks.check_floating(f"initial_state.{name}", part)
        start[name] = start_state(part, shape, accumulate, q, k, v, beta)
    queries, keys, values = (repeat_heads(x.astype(accumulate), heads) for x in (q, k, v))
    out, state = dispatch(
        "mesa",
        {"xla": _xla},
        implementation,
        ("xla",),
        queries,
        keys,
        values,
        beta.astype(accumulate),
        log_decay.astype(accumulate),
        ridge.astype(accumulate) + zeros_varying(ridge.shape, accumulate, q, k, v, beta),
        MesaState((start["h"] + jnp.swapaxes(start["h"], -1, -2)) / 2, start["r"]),
        segment_ids,
        choose_form(form, length),
        iterations,
    )
    return out.astype(q.dtype), state


def _xla(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array,
    ridge: Array,
    state: MesaState,
    segment_ids: Array | None,
    form: str,
    iterations: int,
) -> tuple[Array, MesaState]:
    if form == "recurrent":
        return recurrent(q, k, v, beta, log_decay, ridge, state, segment_ids)
    chunks = functools.partial(
        chunkwise,
        chunk=max(1, q.shape[1]) if form == "parallel" else None,
        iterations=iterations,
        associative=form == "associative",
    )
    return jax.checkpoint(chunks)(q, k, v, beta, log_decay, ridge, state, segment_ids)


def mesa_map(
    k: Keys,
    v: Values,
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"],
    *,
    segment_ids: SegmentIds | None = None,
) -> DiagonalMap:
    """What these tokens do to [H | R], [B, H, K, K + V], S -> P S + R: that of the scalar decay."""
    k, v = (repeat_heads(x, beta.shape[2]) for x in (k, v))
    values = beta[..., None] * jnp.concatenate([k, v], -1)
    return scalar_decay_map(k, values, log_decay, segment_ids=segment_ids)


def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"],
    ridge: Float[Array, "H K"],
    initial_state: MesaState,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T H V"], MesaState]:
    """The equation, token by token, with an exact solve."""
    diagonal = ridge[:, :, None] * jnp.eye(ridge.shape[-1], dtype=ridge.dtype)

    def step(state: MesaState, token: tuple[Array, ...]) -> tuple[MesaState, Array]:
        (h, r), (q, k, v, beta, g) = state, token
        decay, write = jnp.exp(g)[:, :, None, None], (beta[:, :, None] * k)[:, :, :, None]
        h = decay * h + write * k[:, :, None, :]
        r = decay * r + write * v[:, :, None, :]
        y = jnp.linalg.solve(h + diagonal, q[..., None])[..., 0]
        return MesaState(h, r), contract("bhkv,bhk->bhv", r, y)

    return recurrence(step, initial_state, (q, k, v, beta, log_decay), segment_ids)


def chunkwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"],
    ridge: Float[Array, "H K"],
    initial_state: MesaState,
    segment_ids: SegmentIds | None,
    chunk: int | None = None,
    iterations: int = 30,
    associative: bool = False,
) -> tuple[Float[Array, "B T H V"], MesaState]:
    """The products H_t p_t of all tokens of a chunk are a read of its memory, and so is the output:

    H P = ((P K^T) * D) (beta K) + diag(e^G) P H_in        (H + ridge) Y = Q by conjugate gradients
    O = ((Y K^T) * D) (beta V) + diag(e^G) Y R_in          D_ij = e^{G_i - G_j} for j <= i
    """
    length, key_dim = q.shape[1], q.shape[-1]
    if chunk is None:
        chunk = 64 if key_dim <= 64 else 128
    decay = chunk_decay(log_decay[..., None], segment_ids, chunk)
    q, k, v, beta = (split_heads(x, chunk) for x in (q, k, v, beta))  # [B, N, H, C, ...]
    values = beta[..., None] * jnp.concatenate([k, v], -1)

    written = contract("bnhck,bnhcv->bnhkv", k * decay.out, values)
    maps = DiagonalMap(jnp.broadcast_to(decay.keep, (*written.shape[:3], 1, 1)), written)
    start = jnp.concatenate(initial_state, -1)
    maps = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), maps)
    entering, state = entering_states(maps, start, associative=associative)
    entering = jnp.moveaxis(entering, 0, 1)

    ones = jnp.ones_like(beta)[..., None]
    ((pairs,),) = decay.scores((ones,), (ones,))  # D

    def read(p: Array, part: slice) -> Array:
        inside = contract("bnhij,bnhjv->bnhiv", contract("bnhik,bnhjk->bnhij", p, k) * pairs, values[..., part])
        return inside + contract("bnhck,bnhkv->bnhcv", p * decay.into, entering[..., part])

    ridge = ridge[:, None]
    diagonal = contract("bnhij,bnhjk->bnhik", pairs, values[..., :key_dim] * k)
    diagonal += decay.into * jnp.diagonal(entering[..., :key_dim], axis1=-2, axis2=-1)[..., None, :]
    y = solve_positive(lambda p: read(p, slice(key_dim)) + ridge * p, q, diagonal + ridge, iterations)
    out = jnp.moveaxis(read(y, slice(key_dim, None)), 3, 2)
    return from_chunks(out, length), MesaState(state[..., :key_dim], state[..., key_dim:])
