"""MInference: each head reads a pattern of its own that was found offline, whose places are guessed from the input."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.arguments import check_numbers, check_qkv
from effattn_jax.sparse.attention import attention
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.block_masks import ascending, block_causal, block_means, block_products, first_block
from effattn_jax.sparse.kv_buffer import check_sizes
from effattn_jax.sparse.masked_attention import masked_attention
from effattn_jax.sparse.patterns import a_shape
from effattn_jax.sparse.top import top_entries
from effattn_jax.sparse.vertical_slash import VerticalSlash, vertical_slash_attention
from effattn_jax.typing import Array, Float, Int, Queries


class AShape(NamedTuple):
    """The first keys and the nearest, p - j < n_local."""

    n_init: int = 128
    n_local: int = 3968


class BlockTopK(NamedTuple):
    """The blocks of keys of the highest mean logits for a block of queries."""

    topk: int = 100


Pattern = VerticalSlash | AShape | BlockTopK


def minference(
    q: Queries,
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    pattern: Pattern | Sequence[Pattern] = VerticalSlash(),  # noqa: B008
    *,
    block_size: int = 64,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T H V"]:
    """Causal softmax attention of a prompt, each head over its pattern.

    MInference: Jiang et al. 2024, arXiv:2407.02490. Not for training: what an early query reads depends on the last
    ones. Decoding after it reads everything.

    Args:
      q: [B, T, H, K] queries, the last T of the M positions. Keys and queries are rotated before, where they are.
      k, v: [B, M, G, K] keys and [B, M, G, V] values; G divides H.
      pattern: of all heads, or one for each of the H heads, which `search_patterns` finds; heads of equal patterns run
        together. `VerticalSlash`: columns and diagonals that the last 64 queries read most, O(T (vertical + 64 tiles)).
        `AShape`: the first keys and the nearest. `BlockTopK`: the blocks of keys with the highest mean_q . mean_k, up
        to the query's own; M - T must be a multiple of the block.
      block_size: tokens of a block of queries, and of keys.
      scale: factor on the logits; None means K**-0.5. Means of blocks are compared without.
      implementation: see `block_attention`.

    Returns:
      [B, T, H, V] in q's dtype. A query reads at least what its pattern names, and nothing after itself; tiles are
      read as a whole. Every head guesses by itself, in float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes, dtypes, head counts or sizes that do not fit.
    """
    check_qkv(q, k, v)
    check_numbers(scale, None)
    check_sizes(block_size=block_size)
    if k.shape[1] < q.shape[1]:
        checks.fail("k", f"{k.shape[1]} tokens", f"at least the {q.shape[1]} of q, which are the last of them")
    heads, groups = q.shape[2], k.shape[2]
    patterns = [pattern] * heads if isinstance(pattern, Pattern) else list(pattern)
    if len(patterns) != heads:
        checks.fail("pattern", f"{len(patterns)} patterns", f"one, or one for each of the {heads} heads of q")
    outs, order = [], []
    for each in dict.fromkeys(patterns):
        mine = [head for head, other in enumerate(patterns) if other == each]
        of_heads = (q, k, v) if len(mine) == heads else _of_heads(q, k, v, mine, heads // groups)
        outs.append(of_pattern(*of_heads, each, block_size=block_size, scale=scale, implementation=implementation)[0])
        order += mine
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=2)[:, :, np.argsort(order)]


def _of_heads(q: Array, k: Array, v: Array, heads: list[int], group: int) -> tuple[Array, Array, Array]:
    read = [head // group for head in heads]
    used = sorted(set(read))
    if len({read.count(head) for head in used}) > 1:
        used = read  # groups of several sizes: keys of their own for every head
    return q[:, :, np.array(heads)], k[:, :, np.array(used)], v[:, :, np.array(used)]


def of_pattern(
    q: Queries,
    k: Float[Array, "B M G K"],
    v: Float[Array, "B M G V"],
    pattern: Pattern,
    *,
    block_size: int = 64,
    scale: float | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Out and log-sum-exp of heads that all have this pattern. Arguments as of `minference`."""
    checked = {"patterns": 1, **{name: size for name, size in pattern._asdict().items() if "forced" not in name}}
    check_sizes(**checked)
    if isinstance(pattern, VerticalSlash):
        return vertical_slash_attention(
            q, k, v, pattern, block_size=block_size, scale=scale, implementation=implementation
        )
    sizes: dict[str, Any] = {"query_block": block_size, "block_size": block_size}
    if isinstance(pattern, AShape):
        return masked_attention(q, k, v, a_shape(*pattern), scale=scale, implementation=implementation, **sizes)
    lists = top_mean_blocks(q, k, topk=pattern.topk, block_size=block_size)
    return block_attention(q, k, v, lists, scale=scale, implementation=implementation, **sizes)


def top_mean_blocks(
    q: Queries, k: Float[Array, "B M G K"], *, topk: int = 100, block_size: int = 64
) -> Int[Array, "B N H n"]:
    """For every block of queries the `topk` blocks of keys up to it with the highest mean_q . mean_k, ascending, -1
    where there are no more. The own block is not forced."""
    first_block(q.shape[1], k.shape[1], block_size)
    score = block_products(block_means(q, block_size), block_means(k, block_size))
    causal = block_causal(q.shape[1], k.shape[1], block_size, block_size)
    lists = top_entries(jnp.where(causal, score, -jnp.inf), min(topk, score.shape[-1]))
    return jnp.moveaxis(ascending(lists, score.shape[-1]), 1, 2)


def search_patterns(
    q: Queries,
    k: Float[Array, "B M G K"],
    candidates: Sequence[Pattern],
    *,
    block_size: int = 64,
    first_row: int = 0,
    scale: float | None = None,
) -> tuple[list[Pattern], np.ndarray]:
    """For every head the candidate that keeps the most of the weights of full attention, of equal ones the first.

    The kept mass of a row is sum_{j read} p_ij = e^{L_read - L_all}, by log-sum-exps; it is averaged over the rows from
    `first_row` on and over the batch. For a sample of prompts, offline; the candidates should cost alike
    (arXiv:2407.02490, Algorithm 1; the published code compares (30, 800), (100, 750), (500, 700) and (3500, 100)
    columns and diagonals and an A-shape of (100, 800)).

    Returns:
      the H patterns, and the masses [C, H] of the C candidates.
    """
    if not candidates:
        checks.fail("candidates", "none", "at least one pattern")
    if not 0 <= first_row < q.shape[1]:
        checks.fail("first_row", first_row, f"from 0 to {q.shape[1] - 1}")
    options: dict[str, Any] = {"block_size": block_size, "first_row": first_row, "scale": scale}
    measure = [jax.jit(functools.partial(kept_mass, pattern=candidate, **options)) for candidate in candidates]
    mass = np.stack([np.asarray(of_heads(q, k)) for of_heads in measure])
    return [candidates[best] for best in np.argmax(mass, axis=0)], mass


def kept_mass(
    q: Queries,
    k: Float[Array, "B M G K"],
    pattern: Pattern,
    *,
    block_size: int = 64,
    first_row: int = 0,
    scale: float | None = None,
) -> Float[Array, " H"]:
    """The mean of e^{L_read - L_all} of every head."""
    v = jnp.zeros_like(k, shape=(*k.shape[:3], 1))
    read = of_pattern(q, k, v, pattern, block_size=block_size, scale=scale)[1]
    everything = attention(q, k, v, scale=scale, return_lse=True)[1]
    return jnp.mean(jnp.exp(read - everything)[:, first_row:], axis=(0, 1))
