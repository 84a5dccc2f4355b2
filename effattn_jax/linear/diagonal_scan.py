"""Diagonal recurrences: a vector memory of which every channel decays by itself.

    h_t = e^{g_t} * h_{t-1} + x_t

The core of HGRN (Qin et al. 2023, arXiv:2311.04823) and of the RG-LRU of Griffin (De et al. 2024, arXiv:2402.19427).
"""

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation, dispatch, platform
from effattn_jax.linear.affine import DiagonalMap
from effattn_jax.linear.arguments import FORMS, check_gate, check_state, choose_form, real_tokens, start_state
from effattn_jax.linear.chunks import from_chunks, to_chunks
from effattn_jax.linear.recurrence import recurrence
from effattn_jax.linear.segments import document_starts
from effattn_jax.precision import accumulation_dtype
from effattn_jax.typing import Array, Float, SegmentIds

__all__ = ["FORMS", "diagonal_scan", "diagonal_scan_map"]


def diagonal_scan(
    x: Float[Array, "B T ..."],
    log_decay: Float[Array, "B T ..."],
    *,
    initial_state: Float[Array, "B ..."] | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T ..."], Float[Array, "B ..."]]:
    """h_t = e^{g_t} * h_{t-1} + x_t for every channel.

    Args:
      x: [B, T, D] what is written, or [B, T, H, D], or more axes of channels.
      log_decay: g, of the shape of x, the natural logarithm of the decay, <= 0.
      initial_state: [B, D] (or [B, H, D]), the memory of the first document of each row; None means zeros.
      segment_ids: [B, T] documents of packed rows, never decreasing along a row; memory does not cross documents.
        Negative ids mark padding: such a token writes nothing, reads zero and lets the state pass.
      form: "recurrent" (`lax.scan` over tokens), "parallel" (`lax.associative_scan` over the row), "associative"
        (`lax.associative_scan` inside chunks, a scan over chunks), "chunkwise" (loops over the tokens of all chunks
        side by side, a scan over chunks): algorithms for one answer. None takes the single step for T = 1, else
        chunkwise on a CPU and associative elsewhere.
      implementation: where it runs, see `effattn_jax.dispatch`; "xla" is there.

    Returns:
      h [B, T, D] in x's dtype, the memory after every token, and the final state [B, D] in float32 (float64 for float64
      inputs).

    Raises:
      ValueError: shapes, dtypes, form or segment ids that do not fit.
    """
    checks.check_choice("form", form, FORMS)
    checks.check_floating("x", x)
    if x.ndim < 3:
        checks.fail("x", f"shape {x.shape}", "at least 3 dimensions [B, T, D]")
    batch, length, *channels = x.shape
    check_gate("log_decay", log_decay, (x.shape, "[B, T, D]"))
    check_state(initial_state, (batch, *channels), "[B, D]")
    checks.check_segment_ids(segment_ids, batch, length)
    accumulate = accumulation_dtype(x.dtype)
    h, state = dispatch(
        "diagonal_scan",
        {"xla": _xla},
        implementation,
        ("xla",),
        x.astype(accumulate),
        log_decay.astype(accumulate),
        start_state(initial_state, (batch, *channels), accumulate, x, log_decay),
        segment_ids,
        choose_form(form or ("associative" if length > 1 and platform() != "cpu" else None), length),
    )
    return h.astype(x.dtype), state


def _xla(x: Array, log_decay: Array, initial_state: Array, segment_ids: Array | None, form: str) -> tuple[Array, Array]:
    if form == "recurrent":
        return recurrent(x, log_decay, initial_state, segment_ids)
    algorithm = {"parallel": parallel, "associative": associative, "chunkwise": chunkwise}[form]
    return algorithm(x, log_decay, initial_state, segment_ids)


def diagonal_scan_map(
    x: Float[Array, "B T ..."], log_decay: Float[Array, "B T ..."], *, segment_ids: SegmentIds | None = None
) -> DiagonalMap:
    """What these tokens do to the state before them, h -> P * h + R: P = e^{g_1 + ... + g_T}, R = their final state.

    P is 0 where a document ends among the tokens.
    """
    zeros = jnp.zeros_like(x, shape=(x.shape[0], *x.shape[2:]), dtype=jnp.float32)
    _, keep = diagonal_scan(jnp.zeros_like(x), log_decay, initial_state=zeros + 1, segment_ids=segment_ids)
    _, write = diagonal_scan(x, log_decay, initial_state=zeros, segment_ids=segment_ids)
    return DiagonalMap(keep, write)


def recurrent(
    x: Float[Array, "B T ..."],
    log_decay: Float[Array, "B T ..."],
    initial_state: Float[Array, "B ..."],
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T ..."], Float[Array, "B ..."]]:
    """The equation, token by token."""

    def step(h: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
        x, g = token
        h = jnp.exp(g) * h + x
        return h, h

    return recurrence(step, initial_state, (x, log_decay), segment_ids)


def parallel(
    x: Float[Array, "B T ..."],
    log_decay: Float[Array, "B T ..."],
    initial_state: Float[Array, "B ..."],
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T ..."], Float[Array, "B ..."]]:
    """The whole row is one chunk."""
    return associative(x, log_decay, initial_state, segment_ids, chunk=max(1, x.shape[1]))


def associative(
    x: Float[Array, "B T ..."],
    log_decay: Float[Array, "B T ..."],
    initial_state: Float[Array, "B ..."],
    segment_ids: SegmentIds | None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T ..."], Float[Array, "B ..."]]:
    """In a chunk that starts from h_0, the maps h -> e^{g} * h + x composed up to each token, applied to h_0.

    The backward pass keeps the states between chunks and composes again.
    """
    maps = token_maps(x, log_decay, segment_ids, chunk)

    def body(state: Array, tokens: DiagonalMap) -> tuple[Array, Array]:
        upto: DiagonalMap = jax.lax.associative_scan(lambda earlier, later: later.after(earlier), tokens, axis=1)
        h = upto(state[:, None])
        return h[:, -1], h

    by_chunk = jax.tree.map(lambda m: jnp.moveaxis(m, 1, 0), maps)
    state, h = jax.lax.scan(jax.checkpoint(body), initial_state, by_chunk)
    return real_tokens(from_chunks(jnp.moveaxis(h, 0, 1), x.shape[1]), segment_ids), state


def chunkwise(
    x: Float[Array, "B T ..."],
    log_decay: Float[Array, "B T ..."],
    initial_state: Float[Array, "B ..."],
    segment_ids: SegmentIds | None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T ..."], Float[Array, "B ..."]]:
    """Two loops over the tokens of all chunks side by side: the first composes the maps of the chunks, which give the
    states between them; the second starts from those. The backward pass is the same from the last token to the first.
    """
    h, state = _chunks(token_maps(x, log_decay, segment_ids, chunk), initial_state)
    return real_tokens(from_chunks(h, x.shape[1]), segment_ids), state


@jax.custom_vjp
def _chunks(
    maps: DiagonalMap, initial_state: Float[Array, "B ..."]
) -> tuple[Float[Array, "B N C ..."], Float[Array, "B ..."]]:
    return _side_by_side(maps, initial_state)


def _side_by_side(
    maps: DiagonalMap, initial_state: Float[Array, "B ..."], *, reverse: bool = False
) -> tuple[Float[Array, "B N C ..."], Float[Array, "B ..."]]:
    """The memory after every token, and the last one; from the last token to the first where `reverse`."""
    length = maps.keep.shape[2]

    def token(i: Array) -> tuple[Array, DiagonalMap]:
        i = length - 1 - i if reverse else i
        return i, jax.tree.map(lambda m: jax.lax.dynamic_index_in_dim(m, i, 2, keepdims=False), maps)

    nothing = DiagonalMap(jnp.ones_like(maps.keep[:, :, 0]), jnp.zeros_like(maps.write[:, :, 0]))
    whole = jax.lax.fori_loop(0, length, lambda i, before: token(i)[1].after(before), nothing)

    def between(state: Array, chunk: DiagonalMap) -> tuple[Array, Array]:
        return chunk(state), state

    by_chunk = jax.tree.map(lambda m: jnp.moveaxis(m, 1, 0), whole)
    state, entering = jax.lax.scan(between, initial_state, by_chunk, reverse=reverse)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        h, out = carry
        i, here = token(i)
        h = here(h)
        return h, jax.lax.dynamic_update_index_in_dim(out, h, i, 2)

    start = (jnp.moveaxis(entering, 0, 1), jnp.zeros_like(maps.write))
    return jax.lax.fori_loop(0, length, step, start)[1], state


def _forward(maps: DiagonalMap, initial_state: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    h, state = _chunks(maps, initial_state)
    return (h, state), (maps.keep, h, initial_state)


def _backward(kept: tuple[Array, Array, Array], cotangents: tuple[Array, Array]) -> tuple[DiagonalMap, Array]:
    """With l_t = dh_t + e^{g_{t+1}} l_{t+1}: what token t wrote gets l_t, its decay l_t h_{t-1}."""
    keep, h, initial_state = kept
    dh, d_state = cotangents
    flat = lambda m: m.reshape(m.shape[0], -1, *m.shape[3:])  # noqa: E731
    later = jnp.concatenate([flat(keep)[:, 1:], jnp.ones_like(initial_state)[:, None]], 1)
    before = jnp.concatenate([initial_state[:, None], flat(h)[:, :-1]], 1)
    if not h.size:
        return DiagonalMap(keep, h), d_state
    d_write, _ = _side_by_side(DiagonalMap(later.reshape(keep.shape), dh), d_state, reverse=True)
    d_initial = flat(keep)[:, 0] * flat(d_write)[:, 0]
    return DiagonalMap(d_write * before.reshape(h.shape), d_write), d_initial


_chunks.defvjp(_forward, _backward)


def token_maps(
    x: Float[Array, "B T ..."], log_decay: Float[Array, "B T ..."], segment_ids: SegmentIds | None, chunk: int
) -> DiagonalMap:
    """h -> e^{g} * h + x of every token [B, N, C, ...]: the start of a document keeps nothing, padding everything.

    Composed decays are products of numbers in [0, 1], not exponentials of sums: nothing overflows, nothing cancels.
    """
    x, decay = real_tokens(x, segment_ids), jnp.exp(real_tokens(log_decay, segment_ids))
    if segment_ids is not None:
        starts = document_starts(segment_ids)
        decay = jnp.where(starts.reshape(*starts.shape, *(1,) * (x.ndim - 2)), 0, decay)
    return DiagonalMap(to_chunks(decay, chunk, fill=1), to_chunks(x, chunk))
