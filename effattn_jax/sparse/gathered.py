"""One query a row over keys and values that were gathered for it: nothing else of a cache is touched."""

import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.sparse.paged_cache import PagedCache, locate
from effattn_jax.typing import Array, Bool, Float, Int


def read_gathered(
    q: Float[Array, "B 1 H K"],
    k: Float[Array, "B L n K"],
    v: Float[Array, "B L n V"],
    valid: Bool[Array, "B L n"],
    scale: float | None,
) -> Float[Array, "B 1 H V"]:
    """o = sum_j e^{s_j} v_j / sum_j e^{s_j} over the valid ones, in q's dtype; 0 where there are none.

    H / L consecutive heads read the same.
    """
    accumulate = accumulation_dtype(q.dtype)
    k, v = (jnp.where(valid[..., None], x, 0) for x in (k, v))  # 0 * NaN would reach the sums
    batch, _, heads, key_dim = q.shape
    shared = q.reshape(batch, k.shape[1], heads // k.shape[1], key_dim)
    s = (key_dim**-0.5 if scale is None else float(scale)) * contract("blrk,blnk->blrn", shared, k)
    s = jnp.where(valid[:, :, None], s, -jnp.inf)
    # a finite floor: e^{s - m} is 0, not NaN, in a row without keys
    top = jnp.maximum(jnp.max(s, axis=-1, keepdims=True), jnp.finfo(accumulate).min / 2)
    p = jnp.exp(s - top)
    total = jnp.sum(p, axis=-1)[..., None]
    out = contract("blrn,blnv->blrv", p.astype(v.dtype), v) / jnp.where(total == 0, 1, total)
    return out.reshape(batch, 1, heads, -1).astype(q.dtype)


def read_tokens(
    q: Float[Array, "B 1 H K"], cache: PagedCache, tokens: Int[Array, "B H n"], scale: float | None
) -> Float[Array, "B 1 H V"]:
    """Attention of every head to the tokens of its list; -1 is none."""
    valid = (tokens >= 0) & (tokens < cache.length[:, None, None])
    page, slot = locate(cache, jnp.where(valid, tokens, -1))
    group = _groups(q, cache)[:, None]
    return read_gathered(q, cache.k[page, slot, group], cache.v[page, slot, group], valid, scale)


def read_pages(
    q: Float[Array, "B 1 H K"], cache: PagedCache, entries: Int[Array, "B H n"], scale: float | None
) -> Float[Array, "B 1 H V"]:
    """Attention of every head to the pages of its list, entries of the row's table; -1 is none."""
    page_size = cache.k.shape[1]
    position = jnp.where(entries < 0, -1, entries * page_size)[..., None] + jnp.arange(page_size)
    valid = (entries >= 0)[..., None] & (position < cache.length[:, None, None, None])
    page, _ = locate(cache, jnp.where(entries < 0, -1, entries * page_size))
    group = _groups(q, cache)[:, None]
    flat = lambda x: x.reshape(*entries.shape[:2], entries.shape[2] * page_size, *x.shape[4:])  # noqa: E731
    k, v = (flat(pool[page, :, group]) for pool in (cache.k, cache.v))
    return read_gathered(q, k, v, flat(valid), scale)


def check_query(q: Array, cache: PagedCache) -> None:
    checks.check_floating("q", q)
    checks.check_shape("q", q, (cache.length.shape[0], 1, None, cache.k.shape[3]), "[B, 1, H, K] of the cache")
    checks.check_head_groups("cache.k", cache.k.shape[2], "q", q.shape[2])


def _groups(q: Array, cache: PagedCache) -> Int[Array, " H"]:
    """The key head of every head."""
    return jnp.arange(q.shape[2]) // (q.shape[2] // cache.k.shape[2])
