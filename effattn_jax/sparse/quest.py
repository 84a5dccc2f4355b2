"""Quest: one query reads the pages of a cache whose keys could have the highest products with it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.sparse.arguments import check_numbers
from effattn_jax.sparse.gathered import check_query, read_pages
from effattn_jax.sparse.paged_cache import PagedCache, append, pages_since, rewind
from effattn_jax.sparse.top import top_entries
from effattn_jax.typing import Array, Float, Int


class PageBounds(NamedTuple):
    """The least and the greatest of every channel over the keys of a page; of pages in use."""

    low: Float[Array, "P G K"]
    high: Float[Array, "P G K"]


def init_quest(cache: PagedCache) -> PageBounds:
    """Bounds of an empty cache."""
    zeros = jnp.zeros((cache.k.shape[0], *cache.k.shape[2:]), cache.k.dtype)
    return PageBounds(zeros, zeros)


def append_quest(
    cache: PagedCache,
    bounds: PageBounds,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    counts: Int[Array, " B"] | None = None,
) -> tuple[PagedCache, PageBounds]:
    """`append`, and the bounds of the pages that it wrote to."""
    before = cache.length
    cache = append(cache, k, v, counts)
    return cache, _update(cache, bounds, before, k.shape[1])


def rewind_quest(
    cache: PagedCache, bounds: PageBounds, lengths: int | Int[Array, " B"]
) -> tuple[PagedCache, PageBounds]:
    """`rewind`, and the bounds of the pages that lost tokens. After a `reset` nothing needs to be done."""
    cache = rewind(cache, lengths)
    return cache, _update(cache, bounds, jnp.maximum(cache.length - 1, 0), 1)


def _update(cache: PagedCache, bounds: PageBounds, since: Int[Array, " B"], most: int) -> PageBounds:
    """Bounds of the pages with tokens from `since` on, from all of their tokens."""
    page, tokens = pages_since(cache, since, most)
    k = cache.k[page]  # of a page that does not exist any, which is not written
    there = (jnp.arange(k.shape[2]) < tokens[..., None])[..., None, None]
    low = jnp.min(jnp.where(there, k, jnp.inf), axis=2)
    high = jnp.max(jnp.where(there, k, -jnp.inf), axis=2)
    return PageBounds(bounds.low.at[page].set(low, mode="drop"), bounds.high.at[page].set(high, mode="drop"))


def quest(
    q: Float[Array, "B 1 H K"],
    cache: PagedCache,
    bounds: PageBounds,
    *,
    budget: int,
    force_last: bool = True,
    scale: float | None = None,
) -> Float[Array, "B 1 H V"]:
    """Softmax attention of one query a row over the budget / page pages n with the highest bounds

        sum_c max(q_c m_nc, q_c x_nc) = q . (m_n + x_n) / 2 + |q| . (x_n - m_n) / 2 >= max_{j in n} q . k_j

    of the least m_n and the greatest x_n of each channel of its keys.

    Quest: Tang et al. 2024, arXiv:2406.10774. The paper has pages of 16 tokens, and reads everything in its first two
    layers and while it prefills. A step reads two numbers a channel of every page, and the tokens of the chosen pages.

    Args:
      q: [B, 1, H, K], the query of each row's last token, which is in the cache already. G divides H.
      cache: keys are kept rotated, where they are.
      bounds: of the cache, what `append_quest` and `rewind_quest` return.
      budget: tokens that each query head reads at most, a multiple of the page size.
      force_last: the row's last page is one of those that are read.
      scale: factor on the logits; None means K**-0.5.

    Returns:
      [B, 1, H, V] in q's dtype; 0 for a row without tokens. Every head chooses pages of its own, by bounds in float32
      (float64 for float64 inputs); of equal ones the earlier page is taken.

    Raises:
      ValueError: shapes, head counts or a budget that do not fit.
    """
    check_numbers(scale, None)
    return read_pages(q, cache, quest_pages(q, cache, bounds, budget=budget, force_last=force_last), scale)


def quest_pages(
    q: Float[Array, "B 1 H K"], cache: PagedCache, bounds: PageBounds, *, budget: int, force_last: bool = True
) -> Int[Array, "B H n"]:
    """What `quest` reads: entries of the row's table in ascending order, behind as many -1 as there are too few."""
    check_query(q, cache)
    page_size = cache.k.shape[1]
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < page_size or budget % page_size:
        checks.fail("budget", budget, f"a multiple of the {page_size} tokens of a page, at least one")
    score = page_bounds(q, cache, bounds)
    entry, last = jnp.arange(score.shape[-1]), ((cache.length - 1) // page_size)[:, None, None]
    score = jnp.where(entry <= last, score, -jnp.inf)
    if force_last:
        score = jnp.where(entry == last, jnp.inf, score)
    return jnp.sort(top_entries(score, min(budget // page_size, score.shape[-1])), axis=-1)


def page_bounds(q: Float[Array, "B 1 H K"], cache: PagedCache, bounds: PageBounds) -> Float[Array, "B H N"]:
    """The upper bounds of q . k_j over each page of the row's table; anything where there is no page."""
    batch, _, heads, key_dim = q.shape
    accumulate = accumulation_dtype(q.dtype)
    q, bounds = jax.lax.stop_gradient((q, bounds))
    q = q.astype(accumulate).reshape(batch, cache.k.shape[2], -1, key_dim)
    low, high = (x[jnp.maximum(cache.table, 0)].astype(accumulate) for x in bounds)
    score = contract("bgrk,bngk->bgrn", q, (low + high) / 2) + contract("bgrk,bngk->bgrn", abs(q), (high - low) / 2)
    return score.reshape(batch, heads, -1)
