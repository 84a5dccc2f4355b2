"""Buffers of a fixed capacity that caches of routed attention keep: tokens in order, and means of their windows."""

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.precision import accumulation_dtype
from effattn_jax.typing import Array, Bool, Float, Int


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            checks.fail(name, size, "an int of at least 1")


def check_room(
    length: Int[Array, ""] | Int[Array, " B"], capacity: int, tokens: int, new: Int[Array, " B"] | None = None
) -> None:
    """Known at trace time or not: where it is not, the caller must see to it. `new`: of `tokens` in each row."""
    if new is None and tokens > capacity:
        checks.fail("k", f"{tokens} tokens", f"at most the cache's capacity of {capacity}")
    if isinstance(length, jax.core.Tracer) or isinstance(new, jax.core.Tracer) or np.size(length) == 0:
        return
    filled, added = np.broadcast_arrays(length, tokens if new is None else new)
    row = np.unravel_index(np.argmax(filled + added), filled.shape)
    if filled[row] + added[row] > capacity:
        checks.fail("k", f"{added[row]} tokens", f"at most {capacity - filled[row]}, the free slots of the cache")


def check_new(new: Int[Array, " B"] | None, length: Array, batch: int) -> None:
    if new is not None:
        checks.check_shape("new", new, (batch,), "[B]")
        checks.check_shape("cache.length", length, (batch,), "[B], to count tokens of each row")


def of_rows(length: int | Int[Array, ""] | Int[Array, " B"], batch: int) -> Int[Array, " B"]:
    return jnp.broadcast_to(jnp.asarray(length, jnp.int32), (batch,))


def take(x: Float[Array, "B M ..."], index: Int[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Of each row its own tokens."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def write(
    buffer: Float[Array, "B S ..."],
    new: Float[Array, "B T ..."],
    length: Int[Array, ""] | Int[Array, " B"],
    real: Int[Array, " B"] | None = None,
) -> Array:
    """With the new tokens, of each row the first `real`, behind those that there are."""
    if jnp.ndim(length) == 0:
        return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), length, axis=1)
    place = jnp.arange(new.shape[1])
    slot = length[:, None] + place
    return scatter(buffer, new, slot if real is None else jnp.where(place < real[:, None], slot, buffer.shape[1]))


def scatter(buffer: Float[Array, "B S ..."], x: Float[Array, "B n ..."], slot: Int[Array, "B n"]) -> Array:
    """With x in its slots; where there is no such slot, it is dropped."""
    row = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[row, slot].set(x.astype(buffer.dtype), mode="drop")


def slots_of_windows(capacity: int, kernel: int, stride: int) -> int:
    return max(1, (capacity - kernel) // stride + 1)


def new_windows(
    before: Int[Array, " B"], after: Int[Array, " B"], most: int, kernel: int, stride: int
) -> tuple[Int[Array, "B n"], Bool[Array, "B n"]]:
    """The next windows of rows that grow from `before` to `after` tokens, by `most` at most, and which are complete."""
    done, total = (jnp.maximum((tokens - kernel) // stride + 1, 0) for tokens in (before, after))
    which = done[:, None] + jnp.arange((most - 1) // stride + 1)
    return which, which < total[:, None]


def write_windows(
    buffer: Float[Array, "B W ..."],
    values: Float[Array, "B n ..."],
    which: Int[Array, "B n"],
    there: Bool[Array, "B n"],
) -> Float[Array, "B W ..."]:
    return scatter(buffer, values, jnp.where(there, which, buffer.shape[1]))


def append_means(
    means: Float[Array, "B W G K"],
    k: Float[Array, "B S G K"],
    before: Int[Array, ""] | Int[Array, " B"],
    after: Int[Array, ""] | Int[Array, " B"],
    most: int,
    kernel: int,
    stride: int,
) -> Float[Array, "B W G K"]:
    """Means of the windows that are complete with `after` tokens in k, and were not with `before`; reads no more.

    A mean is made of all of its tokens at once, so that it does not depend on how they came.
    """
    rows = (of_rows(before, k.shape[0]), of_rows(after, k.shape[0]))
    which, there = new_windows(*rows, most, kernel, stride)
    index = jnp.where(there, which * stride, 0)[..., None] + jnp.arange(kernel)
    tokens = take(k, jnp.minimum(index, k.shape[1] - 1))
    return write_windows(means, jnp.mean(tokens, axis=2, dtype=accumulation_dtype(k.dtype)), which, there)


def check_rewind(
    length: Int[Array, ""] | Int[Array, " B"], to: int | Int[Array, ""] | Int[Array, " B"], most: int | None = None
) -> None:
    if isinstance(length, jax.core.Tracer) or isinstance(to, jax.core.Tracer):
        return
    now, then = np.asarray(length), np.asarray(to)
    least = np.zeros_like(now) if most is None else np.maximum(0, now - most)
    if not np.all((least <= then) & (then <= now)):
        checks.fail("length", then.tolist(), f"from {least.tolist()} to {now.tolist()} tokens")
