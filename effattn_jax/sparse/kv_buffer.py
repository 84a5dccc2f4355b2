"""Buffers of a fixed capacity that caches of routed attention keep: tokens in order, and means of their windows."""

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.precision import accumulation_dtype
from effattn_jax.typing import Array, Float, Int


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            checks.fail(name, size, "an int of at least 1")


def check_room(length: Int[Array, ""], capacity: int, new: int) -> None:
    """Known at trace time or not: where it is not, the caller must see to it."""
    if new > capacity:
        checks.fail("k", f"{new} tokens", f"at most the cache's capacity of {capacity}")
    if not isinstance(length, jax.core.Tracer) and int(length) + new > capacity:
        checks.fail("k", f"{new} tokens", f"at most {capacity - int(length)}, the free slots of the cache")


def write(buffer: Float[Array, "B S ..."], new: Float[Array, "B T ..."], length: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), length, axis=1)


def slots_of_windows(capacity: int, kernel: int, stride: int) -> int:
    return max(1, (capacity - kernel) // stride + 1)


def new_windows(length: Int[Array, ""], new: int, kernel: int, stride: int) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """The next windows after those of `length` tokens, and how many there are with `new` more tokens: entries from that
    number on are not complete."""
    done, total = (jnp.maximum((tokens - kernel) // stride + 1, 0) for tokens in (length, length + new))
    return done + jnp.arange((new - 1) // stride + 1), total


def write_windows(
    buffer: Float[Array, "B W ..."], values: Float[Array, "B n ..."], which: Int[Array, " n"], total: Int[Array, ""]
) -> Float[Array, "B W ..."]:
    slot = jnp.where(which < total, which, buffer.shape[1])
    return buffer.at[:, slot].set(values.astype(buffer.dtype), mode="drop")


def append_means(
    means: Float[Array, "B W G K"],
    k: Float[Array, "B S G K"],
    length: Int[Array, ""],
    new: int,
    kernel: int,
    stride: int,
) -> Float[Array, "B W G K"]:
    """Means of the windows that the last `new` of length + new tokens in k complete; reads no more than those.

    A mean is made of all of its tokens at once, so that it does not depend on how they came.
    """
    which, total = new_windows(length, new, kernel, stride)
    index = which[:, None] * stride + jnp.arange(kernel)
    tokens = k[:, jnp.minimum(index, k.shape[1] - 1)]
    return write_windows(means, jnp.mean(tokens, axis=2, dtype=accumulation_dtype(k.dtype)), which, total)


def check_rewind(length: Int[Array, ""], to: int | Int[Array, ""], most: int | None = None) -> None:
    if isinstance(length, jax.core.Tracer) or isinstance(to, jax.core.Tracer):
        return
    least = 0 if most is None else max(0, int(length) - most)
    if not least <= int(to) <= int(length):
        checks.fail("length", int(to), f"from {least} to {int(length)} tokens")
