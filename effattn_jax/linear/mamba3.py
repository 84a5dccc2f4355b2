"""The memory of Mamba-3: decay by a scalar, writes of two neighbouring tokens, keys and queries that turn.

    S_t = a_t S_{t-1} + (1 - lambda_t) dt_t a_t k_{t-1} v_{t-1}^T + lambda_t dt_t k_t v_t^T        o_t = S_t^T q_t

with a_t = e^{g_t} and q_t, k_t turned by the sum of the angles of their document up to t (arXiv:2603.15569).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.kernels import implementations_here
from effattn_jax.linear.arguments import (
    FORMS,
    check_gate,
    check_memory,
    check_state,
    choose_form,
    real_tokens,
    start_state,
)
from effattn_jax.linear.recurrence import recurrence
from effattn_jax.linear.scalar_chunkwise import chunkwise
from effattn_jax.linear.scalar_decay import scalar_decay
from effattn_jax.linear.segments import document_starts
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.typing import Array, Bool, Float, Int, MatrixState, Queries, SegmentIds, Values

__all__ = ["FORMS", "Mamba3Memory", "mamba3"]

KERNELS = ("mosaic_gpu", "mosaic_tpu", "triton")


class Mamba3Memory(NamedTuple):
    """What the tokens so far leave: the matrix, and of the last one its angles, turned key and value; in float32."""

    matrix: MatrixState
    turns: Float[Array, "B H R"]  # sum of angles over 2 pi, within half a turn
    key: Float[Array, "B H K"]
    value: Float[Array, "B H V"]


class Tokens(NamedTuple):
    """The arguments of `mamba3`."""

    q: Queries
    k: Float[Array, "B T H K"]
    v: Values
    log_decay: Float[Array, "B T H"]
    dt: Float[Array, "B T H"]
    mix: Float[Array, "B T H"]
    angle: Float[Array, "B T H R"]


def mamba3(
    q: Queries,
    k: Float[Array, "B T H K"],
    v: Values,
    log_decay: Float[Array, "B T H"],
    dt: Float[Array, "B T H"],
    mix: Float[Array, "B T H"],
    angle: Float[Array, "B T H R"],
    *,
    initial_state: Mamba3Memory | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Values, Mamba3Memory]:
    """S_t = a_t S_{t-1} + (1 - lambda_t) dt_t a_t k_{t-1} v_{t-1}^T + lambda_t dt_t k_t v_t^T and o_t = S_t^T q_t.

    A trapezoid between two tokens where Mamba-2 (lambda = 1, no angles) takes the later one. The neighbours
    (x_{2r}, x_{2r+1}) of the first 2 R channels of q and k turn by the sum of angle_r.

    Args:
      q, k: [B, T, H, K] before the rotation.
      v: [B, T, H, V].
      log_decay: g = A dt, [B, T, H], <= 0.
      dt: [B, T, H] steps, > 0.
      mix: lambda, [B, T, H], in [0, 1].
      angle: [B, T, H, R] radians by which a token turns what follows, 2 R <= K.
      initial_state: the memory of the first document of each row; None means nothing.
      segment_ids: [B, T] documents of packed rows, never decreasing along a row; memory does not cross documents.
        Negative ids mark padding: such a token writes nothing, reads zero and lets the state pass.
      form: "recurrent" (`lax.scan` over tokens) or a form of `scalar_decay` on which the rest runs. None takes the
        single step for T = 1, else chunkwise.
      implementation: where `scalar_decay` runs.

    Returns:
      out [B, T, H, V] in q's dtype and the final memory in float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes, dtypes, form or segment ids that do not fit.
    """
    heads = check_memory(q, k, v, None, segment_ids, form)
    batch, length, _, key_dim = q.shape
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_shape(name, x, (batch, length, heads, None), "[B, T, H, K]")
    for name, gate in (("log_decay", log_decay), ("dt", dt), ("mix", mix)):
        check_gate(name, gate, ((batch, length, heads), "[B, T, H]"))
    checks.check_rank("angle", angle, 4, "[B, T, H, R]")
    pairs = angle.shape[-1]
    check_gate("angle", angle, ((batch, length, heads, pairs), "[B, T, H, R]"))
    if 2 * pairs > key_dim:
        checks.fail("angle", f"R = {pairs} angles", f"at most K / 2 = {key_dim / 2:g}")
    accumulate = accumulation_dtype(q.dtype)
    value_dim = v.shape[-1]
    shapes = [(batch, heads, *sizes) for sizes in ((key_dim, value_dim), (pairs,), (key_dim,), (value_dim,))]
    parts = (None,) * 4 if initial_state is None else initial_state
    names = ("[B, H, K, V]", "[B, H, R]", "[B, H, K]", "[B, H, V]")
    for part, shape, letters in zip(parts, shapes, names, strict=True):
        check_state(part, shape, letters)
    like = (q, k, v, log_decay, dt, mix, angle)
    start = Mamba3Memory(*(start_state(x, shape, accumulate, *like) for x, shape in zip(parts, shapes, strict=True)))
    tokens = Tokens(q, k, v, *(x.astype(accumulate) for x in (log_decay, dt, mix, angle)))

    form = choose_form(form, length)
    if form == "recurrent":
        out, state = dispatch("mamba3", {"xla": recurrent}, implementation, ("xla",), tokens, start, segment_ids)
        return out.astype(q.dtype), state

    def rounded(
        name: str, q: Array, k: Array, v: Array, g: Array, S: Array, segment_ids: SegmentIds | None
    ) -> tuple[Array, Array]:
        q, k = q.astype(v.dtype), k.astype(v.dtype)
        return scalar_decay(
            q, k, v, g, scale=1.0, initial_state=S, segment_ids=segment_ids, form=form, implementation=name
        )

    engines: dict[str, Engine] = {name: functools.partial(rounded, name) for name in KERNELS}
    # the gradient of an angle is a sum over tokens that cancels: those of q and k stay as wide as they are accumulated
    engines["xla"] = (
        functools.partial(chunkwise, scale=1.0) if form == "chunkwise" else functools.partial(rounded, "xla")
    )
    on = {name: functools.partial(by_scalar_decay, engine=engine) for name, engine in engines.items()}
    out, state = dispatch("mamba3", on, implementation, implementations_here(form), tokens, start, segment_ids)
    return out.astype(q.dtype), state


def recurrent(
    tokens: Tokens, initial_state: Mamba3Memory, segment_ids: SegmentIds | None
) -> tuple[Float[Array, "B T H V"], Mamba3Memory]:
    """The equation, token by token."""

    def step(state: Mamba3Memory, token: Tokens) -> tuple[Mamba3Memory, Array]:
        q, k, v, g, dt, mix, angle = (x.astype(state.matrix.dtype) for x in token)
        own = mix * dt * jnp.sum(q * k, axis=-1)  # turned or not: unturned, no gradient of an angle cancels in it
        turns = wrapped(state.turns + angle / (2 * jnp.pi))
        q, k = turned(q, turns), turned(k, turns)
        g, dt, mix = (x[..., None, None] for x in (g, dt, mix))
        before = (1 - mix) * dt * state.key[..., :, None] * state.value[..., None, :]
        older = jnp.exp(g) * (state.matrix + before)
        matrix = older + mix * dt * k[..., :, None] * v[..., None, :]
        return Mamba3Memory(matrix, turns, k, v), contract("bhkv,bhk->bhv", older, q) + own[..., None] * v

    return recurrence(step, initial_state, tokens, segment_ids)


Engine = Callable[[Array, Array, Array, Array, Array, SegmentIds | None], tuple[Array, Array]]


def by_scalar_decay(
    tokens: Tokens, initial_state: Mamba3Memory, segment_ids: SegmentIds | None, engine: Engine
) -> tuple[Float[Array, "B T H V"], Mamba3Memory]:
    """With p the real token before t, the part of S_t that older tokens wrote, R_t = S_t - lambda_t dt_t k_t v_t^T, is

        R_t = a_t R_p + a_t (lambda_p dt_p + (1 - lambda_t) dt_t) k_p v_p^T
        o_t = R_t^T q_t + lambda_t dt_t (q_t . k_t) v_t

    the scalar decay of keys and values that come one token late: sums of positive weights, nothing is taken off again.
    """
    q, k, v, log_decay, dt, mix, angle = tokens
    dtype, accumulate = q.dtype, dt.dtype
    own = mix * dt
    now = (own * jnp.sum(q.astype(accumulate) * k.astype(accumulate), axis=-1))[..., None] * v
    turns = summed(angle / (2 * jnp.pi), initial_state.turns, segment_ids)
    q, k = (turned(x.astype(accumulate), turns[:, 1:]) for x in (q, k))

    # One place longer than the row: first comes what was before it, whose own write is in the matrix already.
    keys = jnp.concatenate([initial_state.key[:, None], k], axis=1)
    values = jnp.concatenate([initial_state.value[:, None], v.astype(accumulate)], axis=1)
    owns = jnp.pad(own, ((0, 0), (1, 0), (0, 0)))
    index = last_real(segment_ids, *k.shape[:2])
    take = lambda x, index: jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)  # noqa: E731
    before = index[:, :-1]

    weight = jnp.exp(log_decay) * (take(owns, before) + (1 - mix) * dt)
    if segment_ids is not None:
        weight = jnp.where(document_starts(segment_ids)[..., None], 0, weight)
    late_keys = take(keys, before) * weight[..., None]
    late_values = take(values, before).astype(dtype)
    older, matrix = engine(q, late_keys, late_values, log_decay, initial_state.matrix, segment_ids)

    out = older + real_tokens(now, segment_ids)
    key, value, weight = (take(x, index[:, -1:])[:, 0] for x in (keys, values, owns))
    matrix = matrix + weight[..., None, None] * key[..., :, None] * value[..., None, :]
    return out, Mamba3Memory(matrix, turns[:, -1], key, value)


def last_real(segment_ids: SegmentIds | None, batch: int, length: int) -> Int[Array, "B T+1"]:
    """How many tokens have come with the last real one, before the row, after its first token, ...; 0 means none."""
    count = jnp.broadcast_to(jnp.arange(length + 1), (batch, length + 1))
    if segment_ids is None:
        return count
    real = jnp.pad(segment_ids >= 0, ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(real, count, 0), axis=1)


def summed(
    turns: Float[Array, "B T H R"], start: Float[Array, "B H R"], segment_ids: SegmentIds | None
) -> Float[Array, "B T+1 H R"]:
    """Sums of turns since the start of each document, wrapped, before the row and after each of its tokens."""
    turns = wrapped(jnp.concatenate([start[:, None], turns], axis=1))
    if segment_ids is None:
        return jax.lax.associative_scan(lambda a, b: wrapped(a + b), turns, axis=1)
    real = jnp.pad(segment_ids >= 0, ((0, 0), (1, 0)), constant_values=True)
    starts = jnp.pad(document_starts(segment_ids), ((0, 0), (1, 0)))

    def later(a: tuple[Array, Bool[Array, "..."]], b: tuple[Array, Bool[Array, "..."]]) -> tuple[Array, Array]:
        return jnp.where(b[1], b[0], wrapped(a[0] + b[0])), a[1] | b[1]

    turns = jnp.where(real[..., None, None], turns, 0)
    return jax.lax.associative_scan(later, (turns, starts[..., None, None]), axis=1)[0]


def wrapped(turns: Array) -> Array:
    """Within half a turn of 0. A whole turn is exact in units of turns, as 2 pi is not in radians."""
    return turns - jax.lax.stop_gradient(jnp.round(turns))


def turned(x: Float[Array, "... K"], turns: Float[Array, "... R"]) -> Float[Array, "... K"]:
    """The neighbours (x_{2r}, x_{2r+1}) of the first 2 R channels, rotated."""
    pairs = turns.shape[-1]
    even, odd = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    sin, cos = jnp.sin(2 * jnp.pi * turns), jnp.cos(2 * jnp.pi * turns)
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return jnp.concatenate([rotated.reshape(*x.shape[:-1], 2 * pairs), x[..., 2 * pairs :]], axis=-1)
