"""Heavy hitters: a cache of fixed size that keeps the newest tokens, and of the others those that were read most."""

from typing import NamedTuple

import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.precision import contract
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.sparse.attention import attention
from effattn_jax.sparse.kept import of_groups, pick, to_slots
from effattn_jax.sparse.kv_buffer import check_sizes
from effattn_jax.sparse.last_weights import column_sums
from effattn_jax.sparse.top import top_entries
from effattn_jax.typing import Array, Float, Int


class H2OCache(NamedTuple):
    """S slots per row and key head, in any order; rows have the same length."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    position: Int[Array, "B S G"]  # -1 is an unused slot
    score: Float[Array, "B S G"]  # weights received so far; float32
    length: Int[Array, ""]  # tokens seen


def h2o_prefill(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    heavy: int,
    recent: int,
    scale: float | None = None,
) -> tuple[Float[Array, "B T H V"], H2OCache]:
    """Causal attention of a prompt, and the cache of S = heavy + recent tokens that remains of it.

    A token's score is the sum of the weights A_j = sum_i p_ij that it received from all queries so far. The cache keeps
    the `recent` newest tokens, and of the others the `heavy` with the highest scores; what it drops is gone.

    H2O: Zhang et al. 2023, arXiv:2306.14048, which sets heavy and recent to a tenth of the prompt each. Sums favour
    early tokens, which more queries have seen. Heads that share keys add up their weights; with as many key heads as
    heads it is the paper's choice for each head. Cost O(T^2), memory O(T).

    Args:
      q: [B, T, H, K]; k, v: [B, T, G, K] and [B, T, G, V]; G divides H. Keys are rotated before,
        where they are.
      heavy: tokens kept by their score.
      recent: newest tokens kept, at least 1.
      scale: factor on the logits; None means K**-0.5.

    Returns:
      out [B, T, H, V] in q's dtype, and the cache. Of equal scores the earlier token is kept.

    Raises:
      ValueError: shapes, dtypes, head counts or sizes that do not fit.
    """
    check_qkv(q, k, v)
    check_numbers(scale, None)
    checks.check_shape("k", k, (q.shape[0], q.shape[1], None, None), "[B, T, G, K]")
    check_sizes(heavy=heavy, recent=recent)
    length, slots = q.shape[1], heavy + recent
    score = of_groups(column_sums(q, k, scale), k.shape[2])
    tokens = heavy_and_recent(score, heavy, recent)
    kept = jnp.moveaxis(jnp.take_along_axis(score, tokens, axis=2), 1, 2)
    cache = H2OCache(
        to_slots(pick(k, tokens), slots),
        to_slots(pick(v, tokens), slots),
        to_slots(jnp.moveaxis(tokens, 1, 2), slots, -1).astype(jnp.int32),
        to_slots(kept, slots),
        jnp.asarray(length, jnp.int32),
    )
    return attention(q, k, v, scale=scale), cache


def heavy_and_recent(score: Float[Array, "B G M"], heavy: int, recent: int) -> Int[Array, "B G n"]:
    """The last `recent` of M tokens and the `heavy` others of the highest scores, in ascending order."""
    batch, groups, keys = score.shape
    old = max(0, keys - recent)
    chosen = jnp.sort(top_entries(score[..., :old], min(heavy, old)), axis=-1)
    newest = jnp.broadcast_to(jnp.arange(old, keys), (batch, groups, keys - old))
    return jnp.concatenate([chosen, newest], axis=-1)


def h2o(
    q: Float[Array, "B 1 H K"],
    k: Float[Array, "B 1 G K"],
    v: Float[Array, "B 1 G V"],
    cache: H2OCache,
    *,
    recent: int,
    scale: float | None = None,
) -> tuple[Float[Array, "B 1 H V"], H2OCache]:
    """Attention of a new token to the cache and itself; then it takes a slot, and the weights are added to the scores.

    In a full cache that is the slot of the lowest score among the tokens that are not of the `recent` newest, of equal
    ones the latest. Arguments as of `h2o_prefill`.
    """
    check_qkv(q, k, v)
    check_numbers(scale, None)
    batch, slots, groups, key_dim = cache.k.shape
    checks.check_shape("q", q, (batch, 1, None, key_dim), "[B, 1, H, K] of the cache")
    checks.check_shape("k", k, (batch, 1, groups, key_dim), "[B, 1, G, K] of the cache")
    checks.check_shape("v", v, (batch, 1, groups, cache.v.shape[3]), "[B, 1, G, V] of the cache")
    if not 1 <= recent < slots:
        checks.fail("recent", recent, f"from 1 to {slots - 1}, less than the slots of the cache")
    heads = q.shape[2]
    keys, values = (jnp.concatenate([old, x.astype(old.dtype)], axis=1) for old, x in ((cache.k, k), (cache.v, v)))
    own = jnp.broadcast_to(cache.length, (batch, 1, groups))
    position = jnp.concatenate([cache.position, own], axis=1)

    s = contract("bgrk,bsgk->bgrs", q.reshape(batch, groups, -1, key_dim), keys)
    s = s * (key_dim**-0.5 if scale is None else float(scale))
    s = jnp.where(jnp.moveaxis(position, 1, 2)[:, :, None] >= 0, s, -jnp.inf)
    p = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True))  # its own logit is finite
    p = p / jnp.sum(p, axis=-1, keepdims=True)
    out = contract("bgrs,bsgv->bgrv", p.astype(values.dtype), values)

    score = jnp.pad(cache.score, ((0, 0), (0, 1), (0, 0))) + jnp.moveaxis(jnp.sum(p, axis=2), 1, 2).astype(
        cache.score.dtype
    )
    slot = jnp.where(cache.length < slots, cache.length, _lowest(score, position, cache.length - recent))
    here = jnp.arange(slots)[:, None] == slot[:, None]
    put = lambda x: jnp.where(here.reshape(*here.shape, *(1,) * (x.ndim - 3)), x[:, -1:], x[:, :-1])  # noqa: E731
    cache = H2OCache(put(keys), put(values), put(position), put(score), cache.length + 1)
    return out.reshape(batch, 1, heads, -1).astype(q.dtype), cache


def _lowest(score: Float[Array, "B S G"], position: Int[Array, "B S G"], newest: Int[Array, ""]) -> Int[Array, "B G"]:
    """The slot of the lowest score at positions up to `newest`, of equal ones the latest."""
    score = jnp.where((position >= 0) & (position <= newest), score, jnp.inf)
    equal = score == jnp.min(score, axis=1, keepdims=True)
    return jnp.argmax(jnp.where(equal, position, -1), axis=1)
