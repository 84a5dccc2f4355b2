"""Scalar decay: a matrix memory that forgets by one number per head (and token).

    S_t = e^{g_t} S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

The core of linear attention (g = 0; Katharopoulos et al. 2020, arXiv:2006.16236), RetNet (g constant; Sun et al. 2023,
arXiv:2307.08621), Lightning Attention-2 (Qin et al. 2024, arXiv:2401.04658) and Mamba-2 (g = A dt, q = C, k = B,
v = dt x; Dao & Gu 2024, arXiv:2405.21060).
"""

import jax.numpy as jnp

from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.kernels import (
    hopper_or_interpreter,
    implementations_here,
    refuse_varying,
    refuse_without_triton,
    takes_step,
    tpu_or_interpreter,
)
from effattn_jax.linear.affine import DiagonalMap, diagonal_map
from effattn_jax.linear.arguments import FORMS, check_gate, check_memory, choose_form, repeat_heads, start_state
from effattn_jax.linear.recurrence import recurrence
from effattn_jax.linear.scalar_chunkwise import associative, chunkwise, parallel
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.typing import Array, Float, HeadDecay, Keys, MatrixState, Queries, SegmentIds, Values

__all__ = ["FORMS", "scalar_decay", "scalar_decay_map"]


def scalar_decay(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: HeadDecay | None = None,
    *,
    scale: float | None = None,
    initial_state: MatrixState | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Values, MatrixState]:
    """S_t = e^{g_t} S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t, for every head.

    Heads: H is the largest head count among q, k and v; the others may have fewer that divide H, each serving
    consecutive heads (groups of Mamba-2: q and k shared; grouped-query attention: k and v shared).

    Args:
      q: [B, T, H, K] queries.
      k: [B, T, H, K] keys.
      v: [B, T, H, V] values; V may differ from K.
      log_decay: g, the natural logarithm of the decay, <= 0. None (no decay), [H] or [B, T, H].
      scale: factor on the queries; None means K**-0.5.
      initial_state: [B, H, K, V], the memory of the first document of each row; None means zeros.
      segment_ids: [B, T] documents of packed rows, never decreasing along a row; memory does not cross documents.
        Negative ids mark padding: such a token writes nothing, reads zero and lets the state pass.
      form: "recurrent" (`lax.scan` over tokens), "parallel" (quadratic in T), "chunkwise" (matrix products over chunks,
        a scan over chunks), "associative" (the same, chunks combined by `lax.associative_scan`): algorithms for one
        answer. None takes the single step for T = 1, else chunkwise. The chunkwise form has a backward pass of its own,
        which can be differentiated again; forward mode (`jax.jvp`) takes the other forms.
      implementation: where it runs, see `effattn_jax.dispatch`: "xla", "mosaic_gpu" (Hopper; bfloat16 or float16, K and
        V up to 256) or "mosaic_tpu" (bfloat16 or float32, K and V up to 256; interpreted and compiled so far, not yet
        run on a TPU). The kernels are chunkwise, or for one token a step (K and V multiples of 64 up to 256, every
        dtype of theirs and float32); differentiable once. None takes "mosaic_gpu" for chunks on one GPU that supports
        the call, or inside shard_map(check_vma=False), else "xla". A kernel named on a CPU is interpreted, which is
        slow and meant for tests. "triton" names kernels for GPUs of NVIDIA and AMD that need the extra
        `effattn_jax[triton]` (bfloat16, float16 or float32, K and V up to 256); they do not run on a CPU, and None
        never takes them.

    Returns:
      out [B, T, H, V] in q's dtype and the final state [B, H, K, V] in float32 (float64 for float64 inputs).
      Every form keeps for the backward pass a memory linear in T with states per chunk, never per token (the parallel
      form keeps T^2 scores).

    Raises:
      ValueError: shapes, dtypes, head counts, form or segment ids that do not fit.
    """
    heads = check_memory(q, k, v, initial_state, segment_ids, form)
    batch, length, _, key_dim = q.shape
    if log_decay is None:
        log_decay = jnp.zeros((heads,), accumulation_dtype(q.dtype))
    check_gate("log_decay", log_decay, ((heads,), "[H]"), ((batch, length, heads), "[B, T, H]"))
    accumulate, form = accumulation_dtype(q.dtype), choose_form(form, length)
    out, state = dispatch(
        "scalar_decay",
        {"xla": _xla, "mosaic_gpu": _mosaic_gpu, "mosaic_tpu": _mosaic_tpu, "triton": _triton},
        implementation,
        implementations_here(form),
        q,
        k,
        v,
        log_decay.astype(accumulate),
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
    initial_state: Array,
    segment_ids: Array | None,
    form: str,
    scale: float,
) -> tuple[Array, Array]:
    one_token = takes_step(form, q, v)
    refuse_varying(q, k, v, log_decay, initial_state, segment_ids)
    interpret = hopper_or_interpreter()
    from pallas_kernels.mosaic_gpu.scalar_decay import scalar_decay as chunkwise_kernel
    from pallas_kernels.mosaic_gpu.step import step

    kernel = step if one_token else chunkwise_kernel
    log_decay = jnp.broadcast_to(log_decay, (*q.shape[:2], initial_state.shape[1]))
    return kernel(q, k, v, log_decay, initial_state, segment_ids, scale=scale, interpret=interpret)


def _mosaic_tpu(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    initial_state: Array,
    segment_ids: Array | None,
    form: str,
    scale: float,
) -> tuple[Array, Array]:
    one_token = takes_step(form, q, v)
    interpret = tpu_or_interpreter(q, k, v, log_decay, initial_state, segment_ids)
    from pallas_kernels.mosaic_tpu.scalar_decay import scalar_decay as chunkwise_kernel
    from pallas_kernels.mosaic_tpu.step import step

    kernel = step if one_token else chunkwise_kernel
    log_decay = jnp.broadcast_to(log_decay, (*q.shape[:2], initial_state.shape[1]))
    return kernel(q, k, v, log_decay, initial_state, segment_ids, scale=scale, interpret=interpret)


def _triton(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    initial_state: Array,
    segment_ids: Array | None,
    form: str,
    scale: float,
) -> tuple[Array, Array]:
    takes_step(form, q, v)  # one token is a short chunk
    refuse_varying(q, k, v, log_decay, initial_state, segment_ids)
    refuse_without_triton()
    from pallas_kernels.triton.scalar_decay import scalar_decay as kernel

    log_decay = jnp.broadcast_to(log_decay, (*q.shape[:2], initial_state.shape[1]))
    return kernel(q, k, v, log_decay, initial_state, segment_ids, scale=scale)


def _xla(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    initial_state: Array,
    segment_ids: Array | None,
    form: str,
    scale: float,
) -> tuple[Array, Array]:
    heads = initial_state.shape[1]
    if form == "recurrent":
        q, k, v = (repeat_heads(x.astype(initial_state.dtype), heads) for x in (q, k, v))
        log_decay = jnp.broadcast_to(log_decay, (*q.shape[:2], heads))
        out, state = recurrent(q, k, v, log_decay, initial_state, segment_ids)
        return out * scale, state
    groups = heads if q.shape[2] != k.shape[2] else q.shape[2]
    q, k, v = repeat_heads(q, groups), repeat_heads(k, groups), repeat_heads(v, heads)
    v = v.astype(jnp.result_type(q, k, v))  # the dtype of products
    run = {"parallel": parallel, "chunkwise": chunkwise, "associative": associative}[form]
    return run(q, k, v, log_decay, initial_state, segment_ids, scale)


def scalar_decay_map(
    k: Keys, v: Values, log_decay: HeadDecay | None = None, *, segment_ids: SegmentIds | None = None
) -> DiagonalMap:
    """What these tokens do to the state before them, S -> P S + R: P = e^{g_1 + ... + g_T}, R = their final state.

    `log_decay` has one head for each head of `v`. P is 0 where a document ends among the tokens.
    """

    def final_state(state: Array, write: bool) -> Array:
        values = v if write else jnp.zeros_like(v[..., :1])
        keys = jnp.zeros_like(k[:, :, : k.shape[2]])
        return scalar_decay(keys, k, values, log_decay, initial_state=state, segment_ids=segment_ids)[1]

    return diagonal_map(final_state, k, max(k.shape[2], v.shape[2]), k.shape[-1], v.shape[-1])


def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"],
    initial_state: MatrixState,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T H V"], MatrixState]:
    """The equation, token by token."""

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, g = token
        state = jnp.exp(g)[:, :, None, None] * state + k[:, :, :, None] * v[:, :, None, :]
        return state, contract("bhkv,bhk->bhv", state, q)

    return recurrence(step, initial_state, (q, k, v, log_decay), segment_ids)
