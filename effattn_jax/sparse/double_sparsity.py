"""Double sparsity: one query ranks all tokens by a few channels of their keys, and reads those it ranks highest."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.sparse.arguments import check_numbers
from effattn_jax.sparse.gathered import check_query, read_tokens
from effattn_jax.sparse.kv_buffer import check_sizes
from effattn_jax.sparse.paged_cache import PagedCache, append, locate
from effattn_jax.sparse.top import top_entries
from effattn_jax.typing import Array, Float, Int


class Calibration(NamedTuple):
    """Sums over samples, which may come in any order."""

    total: Float[Array, "G K"]  # float32
    pairs: Int[Array, ""]  # of a token and a head


def init_calibration(kv_heads: int, key_dim: int) -> Calibration:
    """Of no sample."""
    check_sizes(kv_heads=kv_heads, key_dim=key_dim)
    return Calibration(jnp.zeros((kv_heads, key_dim), jnp.float32), jnp.zeros((), jnp.int32))


def calibrate(calibration: Calibration, q: Float[Array, "B T H K"], k: Float[Array, "B T G K"]) -> Calibration:
    """With B T tokens more: sum |q_c k_c| of every token with itself, over the heads of a group."""
    checks.check_shape("k", k, (*q.shape[:2], *calibration.total.shape), "[B, T, G, K] of the calibration")
    checks.check_head_groups("k", k.shape[2], "q", q.shape[2])
    accumulate = accumulation_dtype(q.dtype)
    grouped = q.astype(accumulate).reshape(*k.shape[:3], -1, k.shape[3])
    total = jnp.sum(abs(grouped * k.astype(accumulate)[:, :, :, None]), axis=(0, 1, 3))
    return Calibration(calibration.total + total, calibration.pairs + q.shape[0] * q.shape[1] * grouped.shape[3])


def channel_means(calibration: Calibration) -> Float[Array, "G K"]:
    """The mean of |q_c k_c| over tokens and the heads of a group."""
    return calibration.total / jnp.maximum(calibration.pairs, 1)


def label_channels(calibration: Calibration, channels: int) -> Int[Array, "G r"]:
    """The `channels` with the highest means, highest first."""
    if not 1 <= channels <= calibration.total.shape[1]:
        checks.fail("channels", channels, f"from 1 to the {calibration.total.shape[1]} channels of a key")
    return top_entries(calibration.total, channels)


def init_labels(cache: PagedCache, channels: Int[Array, "G r"]) -> Float[Array, "P page G r"]:
    """Labels of an empty cache."""
    checks.check_shape("channels", channels, (cache.k.shape[2], None), "[G, r]")
    return jnp.zeros((*cache.k.shape[:3], channels.shape[1]), cache.k.dtype)


def append_labels(
    cache: PagedCache,
    labels: Float[Array, "P page G r"],
    channels: Int[Array, "G r"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    counts: Int[Array, " B"] | None = None,
) -> tuple[PagedCache, Float[Array, "P page G r"]]:
    """`append`, and the labels of the new tokens. A `rewind` or `reset` of the cache leaves the labels as they are."""
    before = cache.length
    cache = append(cache, k, v, counts)
    position = before[:, None] + jnp.arange(k.shape[1])
    page, slot = locate(cache, jnp.where(position < cache.length[:, None], position, -1))
    new = jnp.take_along_axis(k, channels[None, None], axis=-1)
    return cache, labels.at[page, slot].set(new.astype(labels.dtype), mode="drop")


def double_sparsity(
    q: Float[Array, "B 1 H K"],
    cache: PagedCache,
    labels: Float[Array, "P page G r"],
    channels: Int[Array, "G r"],
    *,
    heavy: int = 256,
    scale: float | None = None,
) -> Float[Array, "B 1 H V"]:
    """Softmax attention of one query a row over the `heavy` tokens j with the highest sum_{c in channels} q_c k_jc.

    Double sparsity: Yang et al. 2024, arXiv:2408.07092. The channels of a layer are those in which queries and keys are
    large on samples (`calibrate`, `label_channels`); the paper has K / 4 of them, and reads everything in its first two
    layers and while it prefills. Labels are the keys' channels side by side, so that a step reads r numbers of every
    token and all of `heavy` tokens. Heads that share keys share channels; with as many key heads as heads it is the
    paper's choice.

    Args:
      q: [B, 1, H, K], the query of each row's last token, which is in the cache already. G divides H.
      cache: keys are kept rotated, where they are.
      labels: of the cache, what `append_labels` returns.
      channels: [G, r], the channels that labels hold.
      heavy: tokens that each query head reads at most.
      scale: factor on the logits; None means K**-0.5. The ranking has none.

    Returns:
      [B, 1, H, V] in q's dtype; 0 for a row without tokens. Every head ranks by itself, in float32 (float64 for float64
      inputs); of equal tokens the earlier is taken.

    Raises:
      ValueError: shapes, head counts or sizes that do not fit.
    """
    check_numbers(scale, None)
    return read_tokens(q, cache, heavy_tokens(q, cache, labels, channels, heavy=heavy), scale)


def heavy_tokens(
    q: Float[Array, "B 1 H K"],
    cache: PagedCache,
    labels: Float[Array, "P page G r"],
    channels: Int[Array, "G r"],
    *,
    heavy: int = 256,
) -> Int[Array, "B H n"]:
    """What `double_sparsity` reads: positions, highest first; -1 where there are no more."""
    check_query(q, cache)
    check_sizes(heavy=heavy)
    checks.check_shape("labels", labels, (*cache.k.shape[:3], None), "[P, page, G, r]")
    checks.check_shape("channels", channels, (cache.k.shape[2], labels.shape[3]), "[G, r]")
    batch, _, heads, key_dim = q.shape
    accumulate = accumulation_dtype(q.dtype)
    q, labels = jax.lax.stop_gradient((q, labels))
    q = q.astype(accumulate).reshape(batch, cache.k.shape[2], -1, key_dim)
    q = jnp.take_along_axis(q, channels[None, :, None], axis=-1)
    row = labels[jnp.maximum(cache.table, 0)].astype(accumulate)
    row = row.reshape(batch, -1, *row.shape[3:])
    position = jnp.arange(row.shape[1])
    score = contract("bgrk,bsgk->bgrs", q, row).reshape(batch, heads, -1)
    score = jnp.where(position < cache.length[:, None, None], score, -jnp.inf)
    return top_entries(score, min(heavy, row.shape[1]))
