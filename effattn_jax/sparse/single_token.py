"""One query per row over the slots of a cache, in any order: a single read of the keys and values, no tiles."""

from typing import Any

import jax.numpy as jnp

from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.sparse.dense import masked
from effattn_jax.sparse.int8 import dequantised
from effattn_jax.typing import Array, Bool, Float, Int


def read(
    q: Float[Array, "B 1 H K"],
    k: Float[Array, "B S G K"] | Int[Array, "B S G K"],
    v: Float[Array, "B S G V"] | Int[Array, "B S G V"],
    mask: Bool[Array, "B S"],
    *,
    sinks: Float[Array, " H"] | None,
    scale: float | None,
    logits_soft_cap: float | None,
    implementation: Implementation,
    k_scale: Float[Array, "B S G"] | None = None,
    v_scale: Float[Array, "B S G"] | None = None,
) -> Float[Array, "B 1 H V"]:
    """o = sum_j e^{s_j} v_j / (e^z + sum_j e^{s_j}) over the slots j where the mask is true.

    With scales k and v are int8; the scales go to the scores and to the weights, of which there are K times fewer.
    """
    return dispatch(
        "cached_attention",
        {"cudnn": _cudnn, "xla": _xla, "dense": _dense},
        implementation,
        ("xla",),
        q,
        k,
        v,
        mask,
        sinks=sinks,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        logits_soft_cap=logits_soft_cap,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def _xla(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    *,
    sinks: Array | None,
    scale: float,
    logits_soft_cap: float | None,
    k_scale: Array | None,
    v_scale: Array | None,
) -> Array:
    batch, _, heads, key_dim = q.shape
    shared = (k.shape[2], heads // k.shape[2])  # R query heads read the slots of each of G key heads together
    accumulate = accumulation_dtype(q.dtype)
    of_slots = lambda x: jnp.moveaxis(x, 1, 2)[:, :, None]  # noqa: E731
    k = k if k_scale is None else k.astype(q.dtype)
    s = scale * contract("bgrk,bsgk->bgrs", q.reshape(batch, *shared, key_dim), k)
    s = s if k_scale is None else s * of_slots(k_scale)
    if logits_soft_cap is not None:
        s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    s = jnp.where(mask[:, None, None], s, -jnp.inf)
    z = jnp.full((*shared, 1), -jnp.inf, accumulate) if sinks is None else sinks.astype(accumulate).reshape(*shared, 1)
    # a finite floor: e^{s - m} is 0, not NaN, in a row without keys
    top = jnp.maximum(jnp.maximum(jnp.max(s, axis=-1, keepdims=True), z), jnp.finfo(accumulate).min / 2)
    p = jnp.exp(s - top)
    total = jnp.sum(p, axis=-1, keepdims=True) + jnp.exp(z - top)
    if v_scale is not None:
        p, v = p * of_slots(v_scale), v.astype(q.dtype)
    out = contract("bgrs,bsgv->bgrv", p.astype(v.dtype), v) / jnp.where(total == 0, 1, total)
    return out.reshape(batch, 1, heads, -1).astype(q.dtype)


def _dense(
    q: Array, k: Array, v: Array, mask: Array, *, k_scale: Array | None, v_scale: Array | None, **options: Any
) -> Array:
    if k_scale is not None and v_scale is not None:
        k, v = dequantised(k, k_scale, q.dtype), dequantised(v, v_scale, q.dtype)
    return masked(q, k, v, mask[:, None], **options)[0]


def _cudnn(q: Array, k: Array, v: Array, mask: Array, **options: Any) -> Array:
    raise NotImplementedError("one token over a cache is not supported")
