"""The memory of RWKV-4: an average of values whose weights grow with their keys and shrink with their age
(Peng et al. 2023, arXiv:2305.13048).

    o_t = (sum_{j < t} e^{(t - 1 - j) g + k_j} v_j + e^{u + k_t} v_t) / (the same of ones)

Keys are exponents of any size. Numerator and denominator are kept over e^m, with m the largest exponent in them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.linear.arguments import check_gate, choose_form, real_tokens, start_state
from effattn_jax.linear.chunks import from_chunks, to_chunks
from effattn_jax.linear.recurrence import recurrence
from effattn_jax.linear.segments import document_starts
from effattn_jax.precision import accumulation_dtype
from effattn_jax.typing import Array, Float, SegmentIds

__all__ = ["FORMS", "RWKV4Memory", "rwkv4"]

FORMS = ("recurrent", "parallel", "chunkwise")
NOTHING = -1e30  # an exponent of which e^ is 0, and a sum of thousands is still a number


class RWKV4Memory(NamedTuple):
    """What the tokens so far leave: the sums are e^maximum times these; float32."""

    numerator: Float[Array, "B ..."]
    denominator: Float[Array, "B ..."]
    maximum: Float[Array, "B ..."]

    def decayed(self, exponent: Array) -> "RWKV4Memory":
        return self._replace(maximum=self.maximum + exponent)

    def plus(self, other: "RWKV4Memory") -> "RWKV4Memory":
        """Both sums over the larger maximum: no exponent is above 0."""
        maximum = jnp.maximum(self.maximum, other.maximum)
        own, others = jnp.exp(self.maximum - maximum), jnp.exp(other.maximum - maximum)
        return RWKV4Memory(
            own * self.numerator + others * other.numerator,
            own * self.denominator + others * other.denominator,
            maximum,
        )

    @property
    def average(self) -> Array:
        return self.numerator / self.denominator


class _Map(NamedTuple):
    """What some tokens do to the memory before them: its exponents decay, and theirs are added."""

    decay: Float[Array, "B ..."]
    write: RWKV4Memory

    def after(self, earlier: "_Map") -> "_Map":
        return _Map(self.decay + earlier.decay, self(earlier.write))

    def __call__(self, memory: RWKV4Memory) -> RWKV4Memory:
        return memory.decayed(self.decay).plus(self.write)


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
      form: "recurrent" (`lax.scan` over tokens), "parallel" (`lax.associative_scan` over the row), "chunkwise" (the
        same inside chunks, a scan over chunks): algorithms for one answer. None takes the single step for T = 1, else
        chunkwise.
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
        choose_form(form, length),
    )
    return out.astype(v.dtype), state


def _xla(
    k: Array,
    v: Array,
    log_decay: Array,
    bonus: Array,
    initial_state: RWKV4Memory,
    segment_ids: Array | None,
    form: str,
) -> tuple[Array, RWKV4Memory]:
    if form == "recurrent":
        return recurrent(k, v, log_decay, bonus, initial_state, segment_ids)
    chunk = max(1, k.shape[1]) if form == "parallel" else 64
    return chunkwise(k, v, log_decay, bonus, initial_state, segment_ids, chunk=chunk)


def recurrent(
    k: Float[Array, "B T ..."],
    v: Float[Array, "B T ..."],
    log_decay: Float[Array, "..."],
    bonus: Float[Array, "..."],
    initial_state: RWKV4Memory,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T ..."], RWKV4Memory]:
    """The equation, token by token."""

    def step(state: RWKV4Memory, token: tuple[Array, Array]) -> tuple[RWKV4Memory, Array]:
        write = written(*token)
        return state.decayed(log_decay).plus(write), state.plus(write.decayed(bonus)).average

    return recurrence(step, initial_state, (k, v), segment_ids, fresh=nothing(initial_state))


def chunkwise(
    k: Float[Array, "B T ..."],
    v: Float[Array, "B T ..."],
    log_decay: Float[Array, "..."],
    bonus: Float[Array, "..."],
    initial_state: RWKV4Memory,
    segment_ids: SegmentIds | None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T ..."], RWKV4Memory]:
    """In a chunk, the maps of its tokens composed up to each one, applied to the memory that enters.

    The backward pass keeps the memories between chunks and composes again.
    """
    length, channels = k.shape[1], k.ndim - 2
    k, v = (real_tokens(x, segment_ids) for x in (k, v))
    ids = jnp.zeros((1, length), jnp.int32) if segment_ids is None else segment_ids
    over = lambda x: x.reshape(*x.shape, *(1,) * channels)  # noqa: E731
    real, begins = (to_chunks(over(x), chunk) for x in (ids >= 0, document_starts(ids)))
    by_chunk = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (to_chunks(k, chunk), to_chunks(v, chunk), real, begins))

    def body(state: RWKV4Memory, tokens: tuple[Array, ...]) -> tuple[RWKV4Memory, Array]:
        k, v, real, begins = tokens
        write = written(k, v)
        kept = write._replace(
            numerator=jnp.where(real, v, 0),
            denominator=jnp.where(real, write.denominator, 0),
            maximum=jnp.where(real, k, 2 * NOTHING),  # below that of an empty memory: no tie, no gradient
        )
        decay = jnp.where(begins, NOTHING, jnp.where(real, log_decay, 0)) + jnp.zeros_like(k)
        upto: _Map = jax.lax.associative_scan(lambda earlier, later: later.after(earlier), _Map(decay, kept), axis=1)
        after = upto(jax.tree.map(lambda x: x[:, None], state))
        before = jax.tree.map(lambda first, x: jnp.concatenate([first[:, None], x[:, :-1]], 1), state, after)
        before = jax.tree.map(lambda empty, x: jnp.where(begins, empty, x), nothing(before), before)
        return jax.tree.map(lambda x: x[:, -1], after), before.plus(write.decayed(bonus)).average

    state, out = jax.lax.scan(jax.checkpoint(body), initial_state, by_chunk)
    return real_tokens(from_chunks(jnp.moveaxis(out, 0, 1), length), segment_ids), state


def written(k: Array, v: Array) -> RWKV4Memory:
    """e^k v and e^k."""
    return RWKV4Memory(v, jnp.ones_like(v), k)


def nothing(like: RWKV4Memory) -> RWKV4Memory:
    empty = jax.tree.map(jnp.zeros_like, like)
    return empty._replace(maximum=jnp.full_like(like.maximum, NOTHING))
