"""Vector decay: a matrix memory that forgets by one number per channel of the keys (and head and token).

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T

    o_t = scale * S_t^T q_t                                         read after the write
    o_t = scale * (S_{t-1}^T q_t + (q_t . (u * k_t)) v_t)           read before it, with a bonus u for the token itself

The core of GLA (Yang et al. 2023, arXiv:2312.06635) and HGRN2 (k = 1 - e^g; Qin et al. 2024, arXiv:2404.07904), which
read after; of RWKV-5 (g constant) and RWKV-6 (Peng et al. 2024, arXiv:2404.05892), which read before.
"""

import functools

import jax
import jax.numpy as jnp

from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.kernels import (
    hopper_or_interpreter,
    implementations_here,
    refuse_varying,
    takes_step,
    tpu_or_interpreter,
)
from effattn_jax.linear.affine import DiagonalMap, diagonal_map, entering_states
from effattn_jax.linear.arguments import FORMS, check_gate, check_memory, choose_form, repeat_heads, start_state
from effattn_jax.linear.chunks import from_chunks, to_chunks
from effattn_jax.linear.pair_scores import pair_scores, vector_decay_sums
from effattn_jax.linear.recurrence import recurrence
from effattn_jax.linear.segments import chunk_masks
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.typing import Array, Float, Keys, MatrixState, Queries, SegmentIds, Values

__all__ = ["FORMS", "ChannelDecay", "vector_decay", "vector_decay_map"]

ChannelDecay = Float[Array, "B T H K"] | Float[Array, "H K"]  # natural logarithm, <= 0


def vector_decay(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: ChannelDecay,
    *,
    bonus: Float[Array, "H K"] | None = None,
    scale: float | None = None,
    initial_state: MatrixState | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Values, MatrixState]:
    """S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T, read by q_t after the write or, with a bonus, before it.

    Heads: H is the largest head count among q, k and v; the others may have fewer that divide H, each serving
    consecutive heads.

    Args:
      q: [B, T, H, K] queries.
      k: [B, T, H, K] keys.
      v: [B, T, H, V] values; V may differ from K.
      log_decay: g, the natural logarithm of the decay, <= 0: [H, K] or [B, T, H, K].
      bonus: u [H, K]. With it o_t = scale * (S_{t-1}^T q_t + (q_t . (u * k_t)) v_t), else o_t = scale * S_t^T q_t.
      scale: factor on the queries; None means K**-0.5.
      initial_state: [B, H, K, V], the memory of the first document of each row; None means zeros.
      segment_ids: [B, T] documents of packed rows, never decreasing along a row; memory does not cross documents.
        Negative ids mark padding: such a token writes nothing, reads zero and lets the state pass.
      form: "recurrent" (`lax.scan` over tokens), "parallel" (quadratic in T), "chunkwise" (matrix products over chunks,
        a scan over chunks), "associative" (the same, chunks combined by `lax.associative_scan`): algorithms for one
        answer. None takes the single step for T = 1, else chunkwise.
      implementation: where it runs, see `effattn_jax.dispatch`: "xla", "mosaic_gpu" (Hopper; bfloat16 or float16, K and
        V up to 256) or "mosaic_tpu" (bfloat16 or float32, K and V up to 256; interpreted and compiled so far, not yet
        run on a TPU). The kernels are chunkwise, or for one token a step (K and V multiples of 64 up to 256, every
        dtype of theirs and float32); differentiable once. None takes "mosaic_gpu" for chunks on one GPU that supports
        the call, or inside shard_map(check_vma=False), else "xla". A kernel named on a CPU is interpreted, which is
        slow and meant for tests.

    Returns:
      out [B, T, H, V] in q's dtype and the final state [B, H, K, V] in float32 (float64 for float64 inputs).
      Every form keeps for the backward pass a memory linear in T with states per chunk, never per token (the parallel
      form keeps T^2 scores).

    Raises:
      ValueError: shapes, dtypes, head counts, form or segment ids that do not fit.
    """
    heads = check_memory(q, k, v, initial_state, segment_ids, form)
    batch, length, _, key_dim = q.shape
    per_head = ((heads, key_dim), "[H, K]")
    check_gate("log_decay", log_decay, per_head, ((batch, length, heads, key_dim), "[B, T, H, K]"))
    if bonus is not None:
        check_gate("bonus", bonus, per_head)
    accumulate, form = accumulation_dtype(q.dtype), choose_form(form, length)
    out, state = dispatch(
        "vector_decay",
        {"xla": _xla, "mosaic_gpu": _mosaic_gpu, "mosaic_tpu": _mosaic_tpu},
        implementation,
        implementations_here(form),
        q,
        k,
        v,
        log_decay.astype(accumulate),
        None if bonus is None else bonus.astype(accumulate),
        start_state(initial_state, (batch, heads, key_dim, v.shape[-1]), accumulate, q, k, v, log_decay),
        segment_ids,
        form,
        key_dim**-0.5 if scale is None else scale,
    )
    return out.astype(q.dtype), state


def _mosaic_gpu(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    bonus: Array | None,
    initial_state: Array,
    segment_ids: Array | None,
    form: str,
    scale: float,
) -> tuple[Array, Array]:
    one_token = takes_step(form, q, v)
    refuse_varying(q, k, v, log_decay, bonus, initial_state, segment_ids)
    interpret = hopper_or_interpreter()
    from pallas_kernels.mosaic_gpu.step import step
    from pallas_kernels.mosaic_gpu.vector_decay import vector_decay as chunkwise_kernel

    kernel = step if one_token else chunkwise_kernel
    log_decay = jnp.broadcast_to(log_decay, (*q.shape[:2], *initial_state.shape[1:3]))
    return kernel(q, k, v, log_decay, initial_state, segment_ids, bonus=bonus, scale=scale, interpret=interpret)


def _mosaic_tpu(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    bonus: Array | None,
    initial_state: Array,
    segment_ids: Array | None,
    form: str,
    scale: float,
) -> tuple[Array, Array]:
    one_token = takes_step(form, q, v)
    interpret = tpu_or_interpreter(q, k, v, log_decay, bonus, initial_state, segment_ids)
    from pallas_kernels.mosaic_tpu.step import step
    from pallas_kernels.mosaic_tpu.vector_decay import vector_decay as chunkwise_kernel

    kernel = step if one_token else chunkwise_kernel
    log_decay = jnp.broadcast_to(log_decay, (*q.shape[:2], *initial_state.shape[1:3]))
    return kernel(q, k, v, log_decay, initial_state, segment_ids, bonus=bonus, scale=scale, interpret=interpret)


def _xla(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    bonus: Array | None,
    initial_state: Array,
    segment_ids: Array | None,
    form: str,
    scale: float,
) -> tuple[Array, Array]:
    out, state = _xla_unscaled(q, k, v, log_decay, bonus, initial_state, segment_ids, form)
    return out * scale, state


def _xla_unscaled(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    bonus: Array | None,
    initial_state: Array,
    segment_ids: Array | None,
    form: str,
) -> tuple[Array, Array]:
    q, k, v = (repeat_heads(x, initial_state.shape[1]) for x in (q, k, v))
    if form == "recurrent":
        q, k, v = (x.astype(initial_state.dtype) for x in (q, k, v))
        return recurrent(q, k, v, jnp.broadcast_to(log_decay, q.shape), bonus, initial_state, segment_ids)
    if form == "parallel":
        return parallel(q, k, v, log_decay, bonus, initial_state, segment_ids)
    chunks = functools.partial(chunkwise, associative=form == "associative")
    return jax.checkpoint(chunks)(q, k, v, log_decay, bonus, initial_state, segment_ids)


def vector_decay_map(
    k: Keys, v: Values, log_decay: ChannelDecay, *, segment_ids: SegmentIds | None = None
) -> DiagonalMap:
    """What these tokens do to the state before them, S -> P S + R.

    P = diag(e^{g_1 + ... + g_T}), 0 where a document ends among the tokens; R is their final state. A bonus is of no
    consequence here: it is part of the read.
    """

    def final_state(state: Array, write: bool) -> Array:
        values = v if write else jnp.zeros_like(v[..., :1])
        return vector_decay(jnp.zeros_like(k), k, values, log_decay, initial_state=state, segment_ids=segment_ids)[1]

    return diagonal_map(final_state, k, max(k.shape[2], v.shape[2]), k.shape[-1], v.shape[-1])


def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"],
    bonus: Float[Array, "H K"] | None,
    initial_state: MatrixState,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T H V"], MatrixState]:
    """The equation, token by token."""

    def step(before: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, g = token
        write = k[:, :, :, None] * v[:, :, None, :]
        state = jnp.exp(g)[:, :, :, None] * before + write
        seen = state if bonus is None else before + bonus[:, :, None] * write
        return state, contract("bhkv,bhk->bhv", seen, q)

    return recurrence(step, initial_state, (q, k, v, log_decay), segment_ids)


def parallel(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: ChannelDecay,
    bonus: Float[Array, "H K"] | None,
    initial_state: MatrixState,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T H V"], MatrixState]:
    """O = A V with the scores A of all pairs: the whole row is one chunk."""
    return chunkwise(q, k, v, log_decay, bonus, initial_state, segment_ids, chunk=max(1, q.shape[1]))


def chunkwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: ChannelDecay,
    bonus: Float[Array, "H K"] | None,
    initial_state: MatrixState,
    segment_ids: SegmentIds | None,
    chunk: int | None = None,
    associative: bool = False,
) -> tuple[Float[Array, "B T H V"], MatrixState]:
    """In a chunk that starts from S with G_i = g_1 + ... + g_i per channel, every exponent <= 0:

    O = A V + (Q * e^G) S        A_ij = sum_d q_id k_jd e^{G_id - G_jd} for j <= i
    S' = diag(e^{G_C}) S + (K * e^{G_C - G})^T V

    and with a bonus G_i - g_i in place of G_i where i reads, and A_ii = q_i . (u * k_i). `vector_decay` calls it under
    `jax.checkpoint`: the backward pass keeps the arguments and recomputes the rest.
    """
    length = q.shape[1]
    if chunk is None:  # of the order of K; no larger than the row, as the program grows with log2 C
        chunk = min(64, max(1, length))
    if segment_ids is not None:
        real = segment_ids >= 0
    else:  # chunks without padding have the same constant gates: one set of sums serves them
        real = jnp.ones((1, chunk if length % chunk == 0 else length), bool)
    gates = log_decay
    if log_decay.ndim == 2 or segment_ids is not None:
        gates = jnp.where(real[:, :, None, None], log_decay, 0)
    q, k, v, gates = (jnp.moveaxis(to_chunks(x, chunk), 2, 3) for x in (q, k, v, gates))  # [B, N, H, C, ...]
    sums = vector_decay_sums(gates)

    mask = jnp.tril(jnp.ones((chunk, chunk), bool))
    to_end, keep = sums.to_end, sums.keep
    from_start = sums.from_start if bonus is None else sums.from_start_before
    if segment_ids is not None:
        masks = chunk_masks(to_chunks(segment_ids, chunk, fill=-1))
        mask = mask & masks.inside[:, :, None]
        to_end = to_end * masks.out[:, :, None, :, None]
        from_start = from_start * masks.into[:, :, None, :, None]
        keep = keep * masks.keep[:, :, None, None]

    scores = pair_scores(q, k, sums, mask, before=bonus is not None)
    if bonus is not None:
        itself = contract("bnhck,bnhck->bnhc", q * bonus[:, None], k.astype(bonus.dtype))
        scores += jnp.where(mask & jnp.eye(chunk, dtype=bool), itself[..., None], 0)
    inside = contract("bnhij,bnhjv->bnhiv", scores.astype(v.dtype), v)
    written = contract("bnhck,bnhcv->bnhkv", (k * to_end).astype(k.dtype), v)
    keep = jnp.broadcast_to(keep, written.shape[:-1])[..., None]
    maps = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), DiagonalMap(keep, written))
    entering, state = entering_states(maps, initial_state, associative=associative)
    entering = jnp.moveaxis(entering, 0, 1)
    read = contract("bnhck,bnhkv->bnhcv", (q * from_start).astype(q.dtype), entering.astype(q.dtype))
    return from_chunks(jnp.moveaxis(inside + read, 3, 2), length), state
