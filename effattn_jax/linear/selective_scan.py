"""The selective scan of Mamba: N memories per channel, each with a decay of its own.

    h_t = e^{dt_t A} * h_{t-1} + (dt_t x_t) B_t^T        y_t = h_t C_t + D * x_t

(S6; Gu & Dao 2023, arXiv:2312.00752.)
"""

import functools

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation, dispatch, platform
from effattn_jax.linear.affine import DiagonalMap
from effattn_jax.linear.arguments import FORMS, check_gate, check_state, choose_form, real_tokens, start_state
from effattn_jax.linear.chunks import from_chunks, to_chunks
from effattn_jax.linear.recurrence import recurrence
from effattn_jax.linear.segments import document_starts
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.typing import Array, Float, SegmentIds

__all__ = ["FORMS", "selective_scan", "selective_scan_map"]


def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, " D"] | None = None,
    *,
    initial_state: Float[Array, "B D N"] | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """h_t = e^{dt_t A} * h_{t-1} + (dt_t x_t) B_t^T and y_t = h_t C_t + D * x_t.

    Args:
      x: [B, T, D] inputs.
      dt: [B, T, D] steps, > 0 (after softplus and its bias).
      A: [D, N], < 0: channel d forgets memory n by e^{dt_t A_dn}.
      B: [B, T, N] how an input is written, shared by the channels.
      C: [B, T, N] how the memories are read, shared by the channels.
      D: [D] skip, or None.
      initial_state: [B, D, N], the memory of the first document of each row; None means zeros.
      segment_ids: [B, T] documents of packed rows, never decreasing along a row; memory does not cross documents.
        Negative ids mark padding: such a token writes nothing, reads zero and lets the state pass.
      form: algorithms for one answer. "recurrent": `lax.scan` over tokens. "chunkwise": a scan over chunks and token by
        token inside them, laid out for speed. "associative": a scan over chunks, `lax.associative_scan` inside them,
        few long steps for an accelerator. "parallel": `lax.associative_scan` over the row; it alone holds the T D N
        numbers of all states at once. None takes the single step for T = 1, else chunkwise on a CPU and associative
        elsewhere.
      implementation: where it runs, see `effattn_jax.dispatch`; "xla" is there.

    Returns:
      y [B, T, D] in x's dtype and the final state [B, D, N] in float32 (float64 for float64 inputs). The backward pass
      keeps the states between chunks and recomputes those inside.

    Raises:
      ValueError: shapes, dtypes, form or segment ids that do not fit.
    """
    checks.check_choice("form", form, FORMS)
    checks.check_rank("x", x, 3, "[B, T, D]")
    checks.check_floating("x", x)
    batch, length, dim = x.shape
    checks.check_rank("B", B, 3, "[B, T, N]")
    states = B.shape[2]
    check_gate("dt", dt, (x.shape, "[B, T, D]"))
    check_gate("A", A, ((dim, states), "[D, N]"))
    check_gate("B", B, ((batch, length, states), "[B, T, N]"))
    check_gate("C", C, ((batch, length, states), "[B, T, N]"))
    if D is not None:
        check_gate("D", D, ((dim,), "[D]"))
    check_state(initial_state, (batch, dim, states), "[B, D, N]")
    checks.check_segment_ids(segment_ids, batch, length)
    accumulate = accumulation_dtype(x.dtype)
    form = choose_form(form or ("associative" if length > 1 and platform() != "cpu" else None), length)
    y, state = dispatch(
        "selective_scan",
        {"xla": _xla},
        implementation,
        ("xla",),
        x,
        dt.astype(accumulate),
        A.astype(accumulate),
        B,
        C,
        start_state(initial_state, (batch, dim, states), accumulate, x, dt, A, B, C),
        segment_ids,
        form,
    )
    if D is not None:
        y = y + D.astype(accumulate) * real_tokens(x, segment_ids)
    return y.astype(x.dtype), state


def _xla(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    initial_state: Array,
    segment_ids: Array | None,
    form: str,
) -> tuple[Array, Array]:
    if form == "recurrent":
        return recurrent(x, dt, A, B, C, initial_state, segment_ids)
    if form == "parallel":
        return parallel(x, dt, A, B, C, initial_state, segment_ids)
    return chunkwise(x, dt, A, B, C, initial_state, segment_ids, associative=form == "associative")


def selective_scan_map(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    *,
    segment_ids: SegmentIds | None = None,
) -> DiagonalMap:
    """What these tokens do to the state before them, h -> P * h + R: P = e^{(dt_1 + ... + dt_T) A}, R = their final
    state. P is 0 where a document ends among the tokens."""
    zeros = jnp.zeros_like(x, shape=(x.shape[0], *A.shape), dtype=jnp.float32)
    C = jnp.zeros_like(B)
    _, keep = selective_scan(jnp.zeros_like(x), dt, A, B, C, initial_state=zeros + 1, segment_ids=segment_ids)
    _, write = selective_scan(x, dt, A, B, C, initial_state=zeros, segment_ids=segment_ids)
    return DiagonalMap(keep, write)


def recurrent(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    initial_state: Float[Array, "B D N"],
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """The equation, token by token."""
    x, B, C = (z.astype(initial_state.dtype) for z in (x, B, C))

    def step(h: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        x, dt, B, C = token
        h = jnp.exp(dt[:, :, None] * A) * h + (dt * x)[:, :, None] * B[:, None, :]
        return h, contract("bdn,bn->bd", h, C)

    return recurrence(step, initial_state, (x, dt, B, C), segment_ids)


def parallel(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    initial_state: Float[Array, "B D N"],
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """The whole row is one chunk."""
    chunk = max(1, x.shape[1])
    return chunkwise(x, dt, A, B, C, initial_state, segment_ids, chunk=chunk, associative=True)


def chunkwise(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    initial_state: Float[Array, "B D N"],
    segment_ids: SegmentIds | None,
    chunk: int = 64,
    associative: bool = False,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """A scan over chunks; inside, the states live as [N, D], channels side by side, and go no further than their C_t.

    Padding has dt = 0: it keeps the state and writes nothing. The first token of a document keeps nothing.
    """
    length = x.shape[1]
    x, dt, C = (real_tokens(z, segment_ids) for z in (x, dt, C))
    starts = None if segment_ids is None else document_starts(segment_ids)
    # [chunks, tokens of a chunk, rows, ...]
    tokens = jax.tree.map(lambda z: jnp.moveaxis(to_chunks(z, chunk), 0, 2), (x, dt, B, C, starts))
    inside = composed if associative else one_by_one
    body = jax.checkpoint(functools.partial(inside, jnp.swapaxes(A, 0, 1)))
    state, y = jax.lax.scan(body, jnp.swapaxes(initial_state, 1, 2), tokens)
    return from_chunks(jnp.moveaxis(y, 2, 0), length), jnp.swapaxes(state, 1, 2)


Tokens = tuple[Array, Array, Array, Array, Array | None]  # x, dt, B, C, first of a document: [tokens, rows, ...]


def _maps(A: Float[Array, "N D"], tokens: Tokens) -> DiagonalMap:
    """h -> e^{dt A} * h + (dt x) B^T of each token, [..., N, D]."""
    x, dt, B, _, starts = tokens
    keep = jnp.exp(dt[..., None, :] * A)
    if starts is not None:
        keep = jnp.where(starts[..., None, None], 0, keep)
    return DiagonalMap(keep, (dt * x)[..., None, :] * B[..., :, None])


def one_by_one(A: Float[Array, "N D"], state: Array, tokens: Tokens) -> tuple[Array, Array]:
    def step(state: Array, token: Tokens) -> tuple[Array, Array]:
        state = _maps(A, token)(state)
        return state, jnp.sum(state * token[3][..., :, None], axis=-2)

    return jax.lax.scan(step, state, tokens)


def composed(A: Float[Array, "N D"], state: Array, tokens: Tokens) -> tuple[Array, Array]:
    maps = jax.lax.associative_scan(lambda earlier, later: later.after(earlier), _maps(A, tokens))
    states = maps(state)
    return states[-1], contract("cbnd,cbn->cbd", states, tokens[3].astype(states.dtype))
