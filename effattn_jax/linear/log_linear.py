"""Log-linear attention: a scalar-decay memory in O(log T) parts, the recent past in fine ones, the far past in coarse
ones, each read with a weight of its own (Guo et al. 2025, arXiv:2506.04761).

    o_i = scale * sum_{j <= i} lambda_i^{l(i, j)} e^{g_{j+1} + ... + g_i} (q_i . k_j) v_j

with l(i, j) = 0 where i = j, else floor(log2(i xor j)) + 1 (`linear/fenwick.py`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.linear.affine import DenseMap, entering_states
from effattn_jax.linear.arguments import FORMS, check_gate, check_memory, choose_form, repeat_heads, start_state
from effattn_jax.linear.chunks import from_chunks, to_chunks
from effattn_jax.linear.decay import decay_sum, pairwise_decay
from effattn_jax.linear.fenwick import level, members, occupied, slot, token_counts
from effattn_jax.linear.recurrence import recurrence
from effattn_jax.linear.segments import chunk_masks
from effattn_jax.precision import accumulation_dtype, contract, zeros_varying
from effattn_jax.typing import Array, Float, Int, Keys, Queries, SegmentIds, Values

__all__ = ["FORMS", "LogLinearState", "log_linear_attention", "log_linear_map"]


class LogLinearState(NamedTuple):
    """What n tokens of a document leave behind.

    Slot b holds the decayed sum of k v^T over 2^b tokens if digit b of n is 1, and is not read otherwise; the last slot
    holds everything older than those.
    """

    levels: Float[Array, "B H L K V"]  # float32
    seen: Int[Array, " B"]  # n, int32


def log_linear_attention(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: Float[Array, "B T H"],
    level_scales: Float[Array, "B T H L"],
    *,
    scale: float | None = None,
    initial_state: LogLinearState | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Values, LogLinearState]:
    """o_i = scale * sum_{j <= i} lambda_i^{l(i, j)} e^{g_{j+1} + ... + g_i} (q_i . k_j) v_j, for every head.

    With all level scales 1 it is `scalar_decay`. Levels count from the start of a token's own document, wherever that
    is in a packed row and whatever an initial state has seen. Without state and ids the blocks of the levels fall on
    chunks, and whole chunks of a fitting length cost less.

    Args:
      q: [B, T, H, K] queries.
      k: [B, T, H, K] keys.
      v: [B, T, H, V] values; V may differ from K, and q and k may have fewer heads that divide H.
      log_decay: g [B, T, H], the natural logarithm of the decay, <= 0.
      level_scales: lambda [B, T, H, L], the weight of each level. L levels tell 2^(L-1) tokens apart; what is older in
        a longer document stays at the last level.
      scale: factor on the queries; None means K**-0.5.
      initial_state: the memory of the first document of each row; None means nothing seen.
      segment_ids: [B, T] documents of packed rows, never decreasing along a row; negative ids mark padding.
      form: "recurrent", "parallel", "chunkwise" or "associative", as in `scalar_decay`.
      implementation: where it runs, see `effattn_jax.dispatch`; "xla" is there.

    Returns:
      out [B, T, H, V] in q's dtype and the final state.

    Raises:
      ValueError: shapes, dtypes, head counts, form or segment ids that do not fit; more tokens than 2^(L-1).
    """
    heads = check_memory(q, k, v, None, segment_ids, form)
    batch, length, _, key_dim = q.shape
    checks.check_shape("level_scales", level_scales, (batch, length, heads, None), "[B, T, H, L]")
    checks.check_floating("level_scales", level_scales)
    check_gate("log_decay", log_decay, ((batch, length, heads), "[B, T, H]"))
    slots = level_scales.shape[3]
    if not 1 <= slots < 32 or length > 2 ** (slots - 1):
        checks.fail("level_scales", f"{slots} levels for {length} tokens", "1 to 31 levels L with 2^(L-1) >= T")
    accumulate = accumulation_dtype(q.dtype)
    shape = (batch, heads, slots, key_dim, v.shape[-1])
    if initial_state is not None:
        _check_state(initial_state, shape)
    levels = start_state(None if initial_state is None else initial_state.levels, shape, accumulate, q, k, v, log_decay)
    count = zeros_varying((batch,), jnp.int32, *(() if segment_ids is None else (segment_ids,)))
    if initial_state is not None:
        count = count + initial_state.seen.astype(jnp.int32)
        levels = jnp.where(occupied(count, slots)[:, None, :, None, None], levels, 0)
    out, state = dispatch(
        "log_linear_attention",
        {"xla": _xla},
        implementation,
        ("xla",),
        q,
        k,
        v,
        log_decay.astype(accumulate),
        level_scales.astype(accumulate),
        LogLinearState(levels, count),
        segment_ids,
        choose_form(form, length),
        initial_state is None,
    )
    out = out * (key_dim**-0.5 if scale is None else scale)
    return out.astype(q.dtype), state


def _check_state(state: LogLinearState, shape: tuple[int, ...]) -> None:
    checks.check_shape("initial_state.levels", state.levels, shape, "[B, H, L, K, V]")
    checks.check_floating("initial_state.levels", state.levels)
    checks.check_shape("initial_state.seen", state.seen, shape[:1], "[B]")
    if not jnp.issubdtype(jnp.result_type(state.seen), jnp.integer):
        checks.fail("initial_state.seen", f"dtype {jnp.result_type(state.seen)}", "an integer dtype")


def _xla(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    level_scales: Array,
    state: LogLinearState,
    segment_ids: Array | None,
    form: str,
    fresh: bool,
) -> tuple[Array, LogLinearState]:
    heads = log_decay.shape[2]
    if form == "recurrent":
        q, k, v = (repeat_heads(x.astype(state.levels.dtype), heads) for x in (q, k, v))
        return recurrent(q, k, v, log_decay, level_scales, state, segment_ids)
    groups = heads if q.shape[2] != k.shape[2] else q.shape[2]
    q, k, v = repeat_heads(q, groups), repeat_heads(k, groups), repeat_heads(v, heads)
    chunks = functools.partial(
        chunkwise,
        chunk=max(1, q.shape[1]) if form == "parallel" else None,
        associative=form == "associative",
        fresh=fresh,
    )
    return jax.checkpoint(chunks)(q, k, v, log_decay, level_scales, state, segment_ids)


def log_linear_map(
    k: Keys,
    v: Values,
    log_decay: Float[Array, "B T H"],
    slots: int,
    *,
    count: Int[Array, " B"] | None = None,
    segment_ids: SegmentIds | None = None,
) -> DenseMap:
    """What these tokens do to the L = `slots` blocks before them, [B, H, L, K V] flat: S -> P S + R, P: [B, H, L, L].

    P moves blocks together and decays them; where to depends on the `count` of tokens before these (None: 0).
    """
    batch, length, heads = log_decay.shape
    count = jnp.zeros_like(k, shape=(batch,), dtype=jnp.int32) if count is None else count

    def final_levels(keys: Array, values: Array, levels: Array) -> Array:
        scales = jnp.zeros_like(log_decay, shape=(batch, length, heads, slots))
        state = LogLinearState(levels, count)
        _, state = log_linear_attention(
            keys, keys, values, log_decay, scales, initial_state=state, segment_ids=segment_ids
        )
        return state.levels.reshape(batch, heads, slots, -1)

    blank = lambda *shape: jnp.zeros_like(k, shape=(batch, *shape), dtype=jnp.float32)  # noqa: E731
    blocks = blank(heads, slots, 1, slots) + jnp.eye(slots)[:, None]
    return DenseMap(
        final_levels(blank(length, heads, 1), blank(length, heads, slots), blocks),
        final_levels(k, v, blank(heads, slots, k.shape[-1], v.shape[-1])),
    )


def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"],
    level_scales: Float[Array, "B T H L"],
    initial_state: LogLinearState,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T H V"], LogLinearState]:
    """Token n finds block b at level b + 1. Counting it carries over: the blocks below the lowest digit m of n that is
    0, and the token, become block m."""
    slots = level_scales.shape[-1]
    digit = jnp.arange(slots)

    def step(state: LogLinearState, token: tuple[Array, ...]) -> tuple[LogLinearState, Array]:
        (levels, n), (q, k, v, g, scales) = state, token
        levels = jnp.exp(g)[:, :, None, None, None] * levels
        write = k[:, :, :, None] * v[:, :, None, :]
        past = jnp.concatenate([scales[:, :, 1:], scales[:, :, -1:]], axis=-1)
        read = contract("bhlkv,bhl->bhkv", levels, past) + scales[:, :, :1, None] * write
        m = slot(n + 1, n, slots)[:, None]
        at, below = (x[:, None, :, None, None] for x in (digit == m, digit <= m))
        merged = write + jnp.sum(jnp.where(below, levels, 0), axis=2)
        levels = jnp.where(at, merged[:, :, None], jnp.where(below, 0, levels))
        return LogLinearState(levels, n + 1), contract("bhkv,bhk->bhv", read, q)

    return recurrence(step, initial_state, (q, k, v, log_decay, level_scales), segment_ids)


class _Chunks(NamedTuple):
    """Levels and slots of N chunks of C tokens, and the masks of documents."""

    inside: Int[Array, "B N C C"]  # level between two tokens; -1 where the first does not read the second
    read: Float[Array, "B N C S L"]  # one-hot level at which a token reads each slot of the entering memory
    write: Float[Array, "B N C S"]  # one-hot slot of the leaving memory that a token goes to
    move: Float[Array, "B N S S"]  # one-hot slot of the leaving memory that each entering one goes to: [to, from]
    seen: Int[Array, " B"]  # tokens at the end


def _chunk_levels(
    length: int, chunk: int, slots: int, lowest: int, count: Array, segment_ids: Array | None, dtype: Any
) -> _Chunks:
    """Of the slots from `lowest` on. `count` has one row where all rows are alike."""
    chunks = -(-length // chunk)
    if segment_ids is None:
        counts = count[:, None] + jnp.minimum(jnp.arange(1, chunks * chunk + 1, dtype=jnp.int32), length)
        counts = counts.reshape(len(count), chunks, chunk)
    else:
        ids = to_chunks(segment_ids, chunk, fill=-1)
        counts = token_counts(ids.reshape(len(ids), chunks * chunk), count).reshape(ids.shape)
    leaving = counts[:, :, -1]
    entering = jnp.concatenate([count[:, None], leaving], axis=1)[:, :-1]
    index, old = counts - 1, members(entering, slots)[..., lowest:]
    one_hot = functools.partial(jax.nn.one_hot, dtype=dtype)

    inside = level(index[..., :, None], index[..., None, :], slots)
    read = one_hot(level(index[..., None], old[:, :, None, :], slots), slots)
    write = one_hot(slot(leaving[..., None], index, slots) - lowest, slots - lowest)
    move = one_hot(slot(leaving[..., None], old, slots) - lowest, slots - lowest, axis=2)
    mask = jnp.tril(jnp.ones((chunk, chunk), bool))
    if segment_ids is not None:
        masks = chunk_masks(ids)
        mask = mask & masks.inside
        read = read * masks.into[..., None, None]
        write = write * masks.out[..., None]
        move = move * masks.keep[..., None, None]
    last = leaving[:, -1] if chunks else count
    return _Chunks(jnp.where(mask, inside, -1), read, write, move, last)


def chunkwise(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"],
    level_scales: Float[Array, "B T H L"],
    initial_state: LogLinearState,
    segment_ids: SegmentIds | None,
    chunk: int | None = None,
    associative: bool = False,
    fresh: bool = False,
) -> tuple[Float[Array, "B T H V"], LogLinearState]:
    """In a chunk that is entered by blocks S_b with G_i = g_1 + ... + g_i, every exponent <= 0:

    O = ((Q K^T) * D * Lambda) V + diag(e^G) sum_b diag(lambda^{l(., b)}) Q S_b      Lambda_ij = lambda_i^{l(i, j)}
    S'_c = e^{G_C} sum_{b -> c} S_b + (diag(e^{G_C - G} [. -> c]) K)^T V

    where b -> c says which block of the leaving memory an entering one, or a token, is part of. `fresh` promises an
    empty initial state: on a grid of whole chunks the small blocks between chunks are then empty, and left out.
    """
    batch, length, groups, key_dim = q.shape
    value_dim, slots = v.shape[-1], level_scales.shape[-1]
    if chunk is None:
        chunk = 64 if key_dim <= 64 else 128
    heads = (groups, v.shape[2] // groups)  # R heads of v share the keys of each of G groups
    aligned = fresh and segment_ids is None and length % chunk == 0 and chunk & (chunk - 1) == 0
    lowest = min(chunk.bit_length() - 1, slots - 1) if aligned else 0
    count = initial_state.seen[:1] * 0 if fresh and segment_ids is None else initial_state.seen
    levels = _chunk_levels(length, chunk, slots, lowest, count, segment_ids, log_decay.dtype)

    if segment_ids is not None:
        log_decay = jnp.where(segment_ids[..., None] >= 0, log_decay, 0)
    by_head = lambda x: jnp.moveaxis(to_chunks(x, chunk), 2, 3)  # noqa: E731
    split = lambda x: x.reshape(*x.shape[:2], *heads, *x.shape[3:])  # noqa: E731
    q, k = by_head(q), by_head(k)  # [B, N, G, C, K]
    v, scales, g = split(by_head(v)), split(by_head(level_scales)), decay_sum(split(by_head(log_decay)))

    weights = jnp.zeros((), scales.dtype)
    for height in range(slots if lowest == 0 else lowest + 1):
        at = (levels.inside == height)[:, :, None, None]
        weights = weights + jnp.where(at, scales[..., height, None], 0)
    decay = pairwise_decay(g, (levels.inside >= 0)[:, :, None, None])
    scores = contract("bngik,bngjk->bngij", q, k)[:, :, :, None] * decay * weights
    inside = contract("bngrij,bngrjv->bngriv", scores.astype(v.dtype), v)

    to_end = jnp.exp(g.to_end)[..., None] * levels.write[:, :, None, None]  # [B, N, G, R, C, S]
    values = v[..., None, :] * to_end[..., None]
    written = contract("bngck,bngrcsv->bngrskv", k, values.astype(v.dtype))
    keep = jnp.exp(g.total[..., -1])[..., None, None] * levels.move[:, :, None, None]
    flat = (*written.shape[:5], key_dim * value_dim)
    maps = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), DenseMap(keep, written.reshape(flat)))
    state = initial_state.levels[:, :, lowest:].reshape(batch, *flat[2:])
    entering, state = entering_states(maps, state, associative=associative)
    entering = jnp.moveaxis(entering, 0, 1).reshape(written.shape)

    read_scales = contract(
        "bngrcl,bncsl->bngrcs", scales, jnp.broadcast_to(levels.read, (batch, *levels.read.shape[1:]))
    )
    queries = q[:, :, :, None, :, None] * read_scales[..., None]  # [B, N, G, R, C, S, K]
    read = contract("bngrcsk,bngrskv->bngrcv", queries.astype(q.dtype), entering.astype(q.dtype))
    out = inside + read * jnp.exp(g.total)[..., None]
    out = out.reshape(*out.shape[:2], groups * heads[1], chunk, value_dim)
    state = state.reshape(batch, -1, slots - lowest, key_dim, value_dim)
    state = jnp.concatenate([initial_state.levels[:, :, :lowest], state], axis=2)
    count = levels.seen + jnp.zeros_like(initial_state.seen)
    return from_chunks(jnp.moveaxis(out, 3, 2), length), LogLinearState(state, count)
