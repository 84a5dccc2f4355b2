"""The real-gated linear recurrent unit of Griffin (De et al. 2024, arXiv:2402.19427).

a_t = e^{-8 r_t softplus(Lambda)}        h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * x_t)
"""

import jax
import jax.numpy as jnp

from effattn_jax.dispatch import Implementation
from effattn_jax.linear.arguments import check_gate
from effattn_jax.linear.diagonal_scan import diagonal_scan
from effattn_jax.linear.segments import document_starts
from effattn_jax.precision import accumulation_dtype
from effattn_jax.typing import Array, Bool, Float, SegmentIds

SHARPNESS = 8.0
MAX_SQRT_GRADIENT = 1000.0


def rg_lru(
    x: Float[Array, "B T D"],
    r: Float[Array, "B T D"],
    i: Float[Array, "B T D"],
    rate: Float[Array, " D"],
    *,
    initial_state: Float[Array, "B D"] | None = None,
    fresh: Bool[Array, " B"] | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """a_t = e^{-8 r_t softplus(rate)} and h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * x_t).

    The first token of a document has a = 0 and is written whole: h = i * x. The derivative of the square root is at
    most 1000, so that a -> 1 has finite gradients.

    Args:
      x: [B, T, D] inputs.
      r: [B, T, D] recurrence gate in (0, 1).
      i: [B, T, D] input gate in (0, 1).
      rate: [D], Lambda.
      initial_state: [B, D], the memory of the first document of each row.
      fresh: [B] rows that start a document: their initial state is nothing. None: all, if there is no initial state,
        else none.
      segment_ids, form, implementation: as of `diagonal_scan`.

    Returns:
      h [B, T, D] in x's dtype and the final state [B, D] in float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes, dtypes, form or segment ids that do not fit.
    """
    for name, gate in (("r", r), ("i", i)):
        check_gate(name, gate, (x.shape, "[B, T, D]"))
    check_gate("rate", rate, (x.shape[-1:], "[D]"))
    accumulate = accumulation_dtype(x.dtype)
    if fresh is None:
        fresh = jnp.full(x.shape[:1], initial_state is None)
    log_a = -SHARPNESS * r.astype(accumulate) * jax.nn.softplus(rate.astype(accumulate))
    first = _first_tokens(fresh, segment_ids, x.shape[:2])
    multiplier = jnp.where(first[..., None], 1, clipped_sqrt(-jnp.expm1(2 * log_a)))
    if initial_state is not None:
        initial_state = jnp.where(fresh[:, None], 0, initial_state)
    h, state = diagonal_scan(
        multiplier * (i * x.astype(accumulate)),
        log_a,
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        implementation=implementation,
    )
    return h.astype(x.dtype), state


def _first_tokens(
    fresh: Bool[Array, " B"], segment_ids: SegmentIds | None, shape: tuple[int, ...]
) -> Bool[Array, "B T"]:
    """First tokens of documents, that of the first document of a row only where the row is fresh."""
    if segment_ids is None:
        return fresh[:, None] & (jnp.arange(shape[1]) == 0)
    real = segment_ids >= 0
    first = real & (jnp.cumsum(real, axis=1) == 1)
    return document_starts(segment_ids) | (first & fresh[:, None])


@jax.custom_jvp
def clipped_sqrt(x: Array) -> Array:
    """sqrt(x), with a derivative of at most 1000."""
    return jnp.sqrt(x)


@clipped_sqrt.defjvp
def _clipped_sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (t,) = primals, tangents
    return jnp.sqrt(x), t * jax.lax.rsqrt(jnp.maximum(4 * x, MAX_SQRT_GRADIENT**-2))
