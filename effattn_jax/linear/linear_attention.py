"""Linear attention: a softmax whose kernel is a product of features (Katharopoulos et al. 2020, arXiv:2006.16236).

    o_t = sum_{j <= t} (q_t . k_j) v_j / (sum_{j <= t} q_t . k_j + eps)

with features in place of q and k (`feature_maps`). The numerator is a memory of scalar decay, and the denominator one
more column of it: S_t = S_{t-1} + k_t [v_t, 1]^T.
"""

import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.linear.scalar_decay import scalar_decay
from effattn_jax.precision import accumulation_dtype
from effattn_jax.typing import Array, Float, HeadDecay, Keys, Queries, SegmentIds, Values


def linear_attention(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: HeadDecay | None = None,
    *,
    normalise: bool = True,
    eps: float = 1e-6,
    floor: float = 0.0,
    scale: float | None = 1.0,
    initial_state: Float[Array, "B H K V+1"] | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Values, Float[Array, "B H K V+1"]]:
    """o_t = scale S_t^T q_t / (scale z_t . q_t + eps) with S_t = e^{g_t} S_{t-1} + k_t v_t^T, z_t alike with v_t = 1.

    Args:
      q, k: [B, T, H, K] features; without negative entries the denominator is not negative either.
      v: [B, T, H, V] values.
      log_decay: g <= 0; None (no decay), [H] or [B, T, H].
      normalise: divide. Without it this is `scalar_decay`, with states [B, H, K, V].
      eps: added to the denominator.
      floor: the least that the denominator may be after that.
      scale: factor on the queries; None means K**-0.5.
      initial_state: [B, H, K, V + 1]: the last column is z.
      segment_ids, form, implementation: see `scalar_decay`.

    Returns:
      out [B, T, H, V] in q's dtype, and the final state [B, H, K, V + 1] in float32. Padding reads zero.

    Raises:
      ValueError: what `scalar_decay` raises.
    """
    if normalise:
        checks.check_rank("v", v, 4, "[B, T, H, V]")
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    out, state = scalar_decay(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        implementation=implementation,
    )
    if not normalise:
        return out, state
    weighted, total = out[..., :-1], out[..., -1:].astype(accumulation_dtype(out.dtype))
    return (weighted / jnp.maximum(total + eps, floor)).astype(out.dtype), state
