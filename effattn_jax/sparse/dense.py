"""Softmax attention with its whole matrix of weights: the readable oracle, quadratic in memory."""

import jax
import jax.numpy as jnp

from effattn_jax.typing import Array, Bool, Float, Int


def dense(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    *,
    offset: int | Int[Array, ""],
    causal: bool,
    window: int | None,
    sinks: Float[Array, " H"] | None,
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B M"] | None,
    scale: float,
    logits_soft_cap: float | None,
    return_lse: bool,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Out and log-sum-exp of queries at positions offset, offset + 1, ... over keys at positions 0, 1, ..."""
    distance = (offset + jnp.arange(q.shape[1]))[:, None] - jnp.arange(k.shape[1])[None, :]
    mask = jnp.ones((1, *distance.shape), bool)
    if causal:
        mask = mask & (distance >= 0)
    if window is not None:
        mask = mask & (jnp.abs(distance) < window)
    if query_segments is not None and key_segments is not None:
        mask = mask & (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments >= 0)[:, None, :]
    return masked(q, k, v, mask, sinks=sinks, scale=scale, logits_soft_cap=logits_soft_cap)


def masked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    mask: Bool[Array, "#B #T M"],
    *,
    sinks: Float[Array, " H"] | None = None,
    scale: float,
    logits_soft_cap: float | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """o_i = sum_j e^{s_ij} v_j / (e^z + sum_j e^{s_ij}) over the keys j where the mask is true, or 0."""
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2).astype(accumulate) for x in (k, v))
    s = scale * jnp.einsum("bthk,bmhk->bhtm", q.astype(accumulate), k, precision="highest")
    if logits_soft_cap is not None:
        s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    s = jnp.where(mask[:, None], s, -jnp.inf)
    z = jnp.full(s.shape[1], -jnp.inf, accumulate) if sinks is None else sinks.astype(accumulate)
    s = jnp.concatenate([s, jnp.broadcast_to(z[None, :, None, None], (*s.shape[:3], 1))], axis=-1)

    top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    p = jnp.exp(s - top)
    total = jnp.sum(p, axis=-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = jnp.einsum("bhtm,bmhv->bthv", p[..., :-1] / total, v, precision="highest")
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]
    return out.astype(q.dtype), jnp.moveaxis(lse, 1, 2)
