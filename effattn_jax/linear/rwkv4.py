"""The memory of RWKV-4: an average of values whose weights grow with their keys and shrink with their age
(Peng et al. 2023, arXiv:2305.13048).

    o_t = (sum_{j < t} e^{(t - 1 - j) g + k_j} v_j + e^{u + k_t} v_t) / (the same of ones)

Keys are exponents of any size. Numerator and denominator are kept over e^m, with m the largest exponent in them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.linear.arguments import check_gate, real_tokens, start_state
from effattn_jax.linear.diagonal_scan import FORMS, diagonal_scan
from effattn_jax.linear.recurrence import recurrence
from effattn_jax.linear.segments import document_starts
from effattn_jax.precision import accumulation_dtype
from effattn_jax.typing import Array, Bool, Float, SegmentIds

__all__ = ["FORMS", "RWKV4Memory", "rwkv4"]

NOTHING = -1e30  # an exponent of which e^ is 0, and a sum of thousands is still a number


class RWKV4Memory(NamedTuple):
    """What the tokens so far leave: the sums are e^maximum times these; float32."""

    numerator: Float[Array, "B ..."]
    denominator: Float[Array, "B ..."]
    maximum: Float[Array, "B ..."]

    def plus(self, other: "RWKV4Memory", log_decay: Array | float = 0.0) -> "RWKV4Memory":
        """e^{log_decay} times these sums and the others, over the larger maximum, a constant to gradients."""
        maximum = jax.lax.stop_gradient(jnp.maximum(self.maximum + log_decay, other.maximum))
        own = jnp.exp((self.maximum - maximum) + log_decay)  # in this order: what `maximum` lost to rounding is here
        others = jnp.exp(other.maximum - maximum)
        return RWKV4Memory(
            own * self.numerator + others * other.numerator,
            own * self.denominator + others * other.denominator,
            maximum,
        )

    def over(self, maximum: Array, before: Array) -> "RWKV4Memory":
        """The same sums over another maximum."""
        scale = jnp.exp(before - maximum)
        return RWKV4Memory(scale * self.numerator, scale * self.denominator, maximum)

    @property
    def average(self) -> Array:
        return self.numerator / self.denominator


def rwkv4(
    k: Float[Array, "B T ..."],
    v: Float[Array, "B T ..."],
    log_decay: Float[Array, "..."],
    bonus: Float[Array, "..."],
    *,
    initial_state: RWKV4Memory | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T ..."], RWKV4Memory]:
    """o_t = (a_{t-1} + e^{u + k_t} v_t) / (b_{t-1} + e^{u + k_t}) for every channel, with

        a_t = e^g a_{t-1} + e^{k_t} v_t        b_t = e^g b_{t-1} + e^{k_t}

    Args:
      k: [B, T, D] exponents of the weights, or more axes of channels.
      v: values, of the shape of k.
      log_decay: g [D], the natural logarithm of the decay, <= 0; -e^w for the published `time_decay` w.
      bonus: u [D], added to the exponent of the token that reads; `time_first`.
      initial_state: a / e^m, b / e^m and m [B, D] of the first document of each row; None means nothing,
        as does a denominator of 0, whatever the maximum.
      segment_ids: [B, T] documents of packed rows, never decreasing along a row; memory does not cross documents.
        Negative ids mark padding: such a token writes nothing, reads zero and lets the state pass.
      form: "recurrent" (`lax.scan` over tokens), or "parallel", "associative", "chunkwise": the maxima by
        `lax.associative_scan`, then the sums by that form of `diagonal_scan`. None takes the single step for T = 1,
        else what `diagonal_scan` takes.
      implementation: where it runs, see `effattn_jax.dispatch`; "xla" is there.

    Returns:
      out in v's dtype and the final memory in float32 (float64 for float64 inputs); m = -1e30 where there is nothing.

    Raises:
      ValueError: shapes, dtypes, form or segment ids that do not fit.
    """
    checks.check_choice("form", form, FORMS)
    checks.check_floating("k", k)
    if k.ndim < 3:
        checks.fail("k", f"shape {k.shape}", "at least 3 dimensions [B, T, D]")
    check_gate("v", v, (k.shape, "[B, T, D]"))
    batch, length, *channels = k.shape
    for name, gate in (("log_decay", log_decay), ("bonus", bonus)):
        check_gate(name, gate, (tuple(channels), "[D]"))
    checks.check_segment_ids(segment_ids, batch, length)
    accumulate, shape = accumulation_dtype(k.dtype), (batch, *channels)
    parts: RWKV4Memory | tuple[None, ...] = (None, None, None) if initial_state is None else initial_state
    for name, part in zip(RWKV4Memory._fields, parts, strict=True):
        if part is not None:
            checks.check_shape(f"initial_state.{name}", part, shape, "[B, D]")
            checks.check_floating(f"initial_state.{name}", part)
    start = RWKV4Memory(*(start_state(part, shape, accumulate, k, v, log_decay, bonus) for part in parts))
    start = start._replace(maximum=jnp.where(start.denominator == 0, NOTHING, start.maximum))
    out, state = dispatch(
        "rwkv4",
        {"xla": _xla},
        implementation,
        ("xla",),
        k.astype(accumulate),
        v.astype(accumulate),
        log_decay.astype(accumulate),
        bonus.astype(accumulate),
        start,
        segment_ids,
        form or ("recurrent" if length == 1 else None),
    )
    return out.astype(v.dtype), state


def _xla(
    k: Array,
    v: Array,
    log_decay: Array,
    bonus: Array,
    initial_state: RWKV4Memory,
    segment_ids: Array | None,
    form: str | None,
) -> tuple[Array, RWKV4Memory]:
    if not k.shape[1]:
        return v, initial_state
    algorithm = recurrent
    if form != "recurrent":
        scan = lambda x, g, start: diagonal_scan(x, g, initial_state=start, form=form)  # noqa: E731
        algorithm = jax.checkpoint(functools.partial(by_diagonal_scan, scan))
    return with_gradients(algorithm, k, v, log_decay, bonus, initial_state, segment_ids)


def with_gradients(
    algorithm: Callable[..., tuple[Array, RWKV4Memory, Array]],
    k: Float[Array, "B T ..."],
    v: Float[Array, "B T ..."],
    log_decay: Float[Array, "..."],
    bonus: Float[Array, "..."],
    initial_state: RWKV4Memory,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T ..."], RWKV4Memory]:
    """An algorithm to which all maxima are constants: what it reads does not depend on them, and sums of gradients that
    cancel are not taken. The memory that enters and the one that leaves do depend on theirs; the last one it computes
    anew, from the exponent of one token and how long ago that was: a small decay is not added token by token.
    """
    first = jax.lax.stop_gradient(initial_state.maximum)
    start = initial_state.over(first, initial_state.maximum)
    out, last, maximum = algorithm(k, v, log_decay, bonus, start, initial_state.maximum, segment_ids)
    return out, last.over(maximum, last.maximum)


def recurrent(
    k: Float[Array, "B T ..."],
    v: Float[Array, "B T ..."],
    log_decay: Float[Array, "..."],
    bonus: Float[Array, "..."],
    initial_state: RWKV4Memory,
    first: Float[Array, "B ..."],
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T ..."], RWKV4Memory, Float[Array, "B ..."]]:
    """The equation, token by token."""
    Carry = tuple[RWKV4Memory, Array, Array]  # the last two: the exponent that is the maximum, and its age

    def step(carry: Carry, token: tuple[Array, Array]) -> tuple[Carry, Array]:
        (state, top, age), (k, v) = carry, token
        out = state.plus(written(v, k + bonus)).average
        is_top = k > top + (age + 1) * log_decay
        top, age = jnp.where(is_top, k, top), jnp.where(is_top, 0, age + 1)
        return (state.plus(written(v, k), log_decay), top, age), out

    start = (initial_state, first, jnp.zeros_like(first))
    fresh = (nothing(initial_state), jnp.full_like(first, NOTHING), start[2])
    out, (last, top, age) = recurrence(step, start, (k, v), segment_ids, fresh=fresh)
    return out, last, top + age * log_decay


def by_diagonal_scan(
    scan: Callable[[Array, Array, Array], tuple[Array, Array]],
    k: Float[Array, "B T ..."],
    v: Float[Array, "B T ..."],
    log_decay: Float[Array, "..."],
    bonus: Float[Array, "..."],
    initial_state: RWKV4Memory,
    first: Float[Array, "B ..."],
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T ..."], RWKV4Memory, Float[Array, "B ..."]]:
    """With the largest exponents m_t of all tokens, both sums are one diagonal recurrence of exponents <= 0:

    [a | b]_t = e^{m_{t-1} + g - m_t} [a | b]_{t-1} + e^{k_t - m_t} [v_t | 1]
    """
    k, v = (real_tokens(x, segment_ids) for x in (k, v))
    ids = jnp.zeros(k.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    over = lambda x: x.reshape(*x.shape, *(1,) * (k.ndim - 2))  # noqa: E731
    real, begins = over(ids >= 0), over(document_starts(ids))

    constant = jax.lax.stop_gradient
    m = largest(constant(k), constant(log_decay), initial_state.maximum, real, begins)
    before = jnp.where(begins, NOTHING, jnp.concatenate([initial_state.maximum[:, None], m[:, :-1]], 1))
    entering = jnp.stack([initial_state.numerator, initial_state.denominator], -1)
    # In this order: the maxima are near, their difference exact, and no rounding adds up over the tokens.
    decay = jnp.where(begins, NOTHING, jnp.where(real, (before - m) + log_decay, 0))
    weight = jnp.where(real, jnp.exp(jnp.where(real, k - m, 0)), 0)
    sums, last = scan(
        weight[..., None] * jnp.stack([v, jnp.ones_like(v)], -1),
        jnp.broadcast_to(decay[..., None], (*k.shape, 2)),
        entering,
    )
    found = jnp.where(begins[..., None], 0, jnp.concatenate([entering[:, None], sums[:, :-1]], 1))
    out = RWKV4Memory(found[..., 0], found[..., 1], before).plus(written(v, k + bonus)).average
    memory = RWKV4Memory(last[..., 0], last[..., 1], m[:, -1])
    return real_tokens(out, segment_ids), memory, leaving(k, log_decay, first, segment_ids)


def largest(
    k: Float[Array, "B T ..."],
    log_decay: Float[Array, "..."],
    first: Float[Array, "B ..."],
    real: Bool[Array, "B T ..."],
    begins: Bool[Array, "B T ..."],
) -> Float[Array, "B T ..."]:
    """m_t = max(m_{t-1} + g, k_t), by maps m -> max(m + decay, k) that compose."""
    decay = jnp.where(begins, NOTHING, jnp.where(real, log_decay, 0)) + jnp.zeros_like(k)

    def after(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] + later[0], jnp.maximum(earlier[1] + later[0], later[1])

    total, m = jax.lax.associative_scan(after, (decay, jnp.where(real, k, NOTHING)), axis=1)
    return jnp.maximum(first[:, None] + total, m)


def leaving(
    k: Float[Array, "B T ..."],
    log_decay: Float[Array, "..."],
    first: Float[Array, "B ..."],
    segment_ids: SegmentIds | None,
) -> Float[Array, "B ..."]:
    """The last m as a maximum over the tokens of the last document and the memory before them."""
    ids = jnp.zeros(k.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    real = ids >= 0
    later = jnp.cumsum(real[:, ::-1], axis=1)[:, ::-1] - real
    over = lambda x: x.reshape(*x.shape, *(1,) * (k.ndim - 2))  # noqa: E731
    own = over(real & (ids == jnp.max(ids, axis=1, keepdims=True)))
    tokens = jnp.where(own, k + over(later) * log_decay, NOTHING)
    count = over(jnp.sum(real, axis=1, keepdims=True))[:, 0]
    kept = jnp.where(over(jnp.any(document_starts(ids), axis=1)), NOTHING, first + count * log_decay)
    which = jnp.argmax(tokens, axis=1)[:, None]  # an index: comparisons, done anew in the backward pass, may not agree
    token = jnp.take_along_axis(tokens, which, axis=1)[:, 0]
    return jnp.where(token > kept, token, kept)


def written(v: Array, k: Array) -> RWKV4Memory:
    """e^k v and e^k."""
    return RWKV4Memory(v, jnp.ones_like(v), k)


def nothing(like: RWKV4Memory) -> RWKV4Memory:
    empty = jax.tree.map(jnp.zeros_like, like)
    return empty._replace(maximum=jnp.full_like(like.maximum, NOTHING))
