"""RetrievalAttention: the first and the newest tokens, and those an index finds (Liu et al. 2024, arXiv:2409.10516).

The index is on the host, with a part for each row and key head; the tokens of the static set and those found are two
softmaxes, which are joined. Decoding only; nothing has gradients.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.sparse.cache import KVCache
from effattn_jax.sparse.key_index import ExactIndex, KeyIndex
from effattn_jax.sparse.merge import merge
from effattn_jax.typing import Array, Float, Int


class KeyIndices:
    """An index for each row and key head, over the keys behind the first `initial` tokens that are no longer recent."""

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        key_dim: int,
        *,
        initial: int = 128,
        recent: int = 512,
        index: Callable[[int], KeyIndex] = ExactIndex,
    ):
        for name, count, least in (("initial", initial, 0), ("recent", recent, 1)):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                checks.fail(name, count, f"an int of at least {least}")
        self.initial, self.recent, self.key_dim = initial, recent, key_dim
        self.indices: Sequence[Sequence[KeyIndex]] = [[index(key_dim) for _ in range(kv_heads)] for _ in range(batch)]
        self.until = initial  # tokens before are first ones or in the indices

    def update(self, cache: KVCache) -> None:
        """Take in what is no longer recent; call it after every token or so, outside of `jit`."""
        until = max(self.until, int(cache.length) - self.recent)
        if until > self.until:
            keys = np.asarray(cache.k[:, self.until : until], np.float32)
            for row, of_row in enumerate(self.indices):
                for head, index in enumerate(of_row):
                    index.add(keys[row, :, head])
            self.until = until

    def check_update(self, length: int) -> None:
        newest = length - self.until
        if newest > 2 * self.recent:
            checks.fail("indices", f"{newest} tokens that are not indexed", f"update() at {2 * self.recent} or less")

    def search(self, q: np.ndarray, count: int) -> np.ndarray:
        """[B, H, K] -> the positions of `count` keys of the head's own index, -1 where there are no more: [B, H, n]."""
        group = q.shape[1] // len(self.indices[0])
        found = [
            [index.search(q[row, group * head : group * (head + 1)], count) for head, index in enumerate(of_row)]
            for row, of_row in enumerate(self.indices)
        ]
        numbers = np.concatenate(found, axis=0).reshape(*q.shape[:2], count)
        return np.where(numbers < 0, -1, numbers + self.initial).astype(np.int32)


def retrieval_attention(
    q: Float[Array, "B 1 H K"],
    cache: KVCache,
    indices: KeyIndices,
    *,
    topk: int = 100,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B 1 H V"]:
    """Softmax attention of the newest token over the first `initial` tokens, the newest, and topk that the index finds.

    The newest are all tokens that the index does not hold: `recent` of them right after `indices.update(cache)`, and
    up to twice as many before the next one is due.

    Args:
      q: [B, 1, H, K] the query of the newest token of the cache, whose documents are not looked at.
      cache: of `init_cache`, which holds the token already.
      indices: of the same rows and heads; they are asked on the host, under `jit` through a callback.
      topk: keys that a query head retrieves.
      scale: factor on the logits; None means K**-0.5.

    Returns:
      out [B, 1, H, V] in q's dtype.

    Raises:
      ValueError: more than one token, shapes that do not fit, an update that is overdue (under `jit` a runtime error
        with this message).
    """
    batch, capacity, groups, key_dim = cache.k.shape
    checks.check_shape("q", q, (batch, 1, None, key_dim), "[B, 1, H, K]")
    checks.check_head_groups("cache.k", groups, "q", q.shape[2])
    if (len(indices.indices), len(indices.indices[0]), indices.key_dim) != (batch, groups, key_dim):
        sizes = f"{len(indices.indices)} rows, {len(indices.indices[0])} heads of {indices.key_dim}"
        checks.fail("indices", sizes, f"{batch} rows, {groups} heads of {key_dim}, as of the cache")
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
        checks.fail("topk", topk, "an int of at least 1")
    heads = q.shape[2]
    first = jnp.arange(min(indices.initial, capacity))
    newest = cache.length - 1 - jnp.arange(min(2 * indices.recent, capacity))

    if not isinstance(cache.length, jax.core.Tracer):
        indices.check_update(int(cache.length))

    def search(q: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices.check_update(int(length))
        return indices.search(np.asarray(q, np.float32), topk), np.asarray(indices.until, np.int32)

    shapes = jax.ShapeDtypeStruct((batch, heads, topk), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    found, until = jax.pure_callback(search, shapes, jax.lax.stop_gradient(q[:, 0]), cache.length)
    static = jnp.concatenate([first, jnp.where(newest >= jnp.maximum(until, len(first)), newest, -1)])
    lists: list[Int[Array, "B 1 H n"]] = [
        jnp.broadcast_to(static, (batch, 1, heads, len(static))),
        found[:, None],
    ]
    parts = [
        block_attention(
            q,
            cache.k,
            cache.v,
            tokens,
            block_size=1,
            offset=cache.length - 1,
            scale=scale,
            implementation=implementation,
        )
        for tokens in lists
    ]
    return merge(*zip(*parts, strict=True))[0]
