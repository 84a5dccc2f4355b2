"""Queries over compressed windows of keys: a softmax over few entries, whose weights also tell which blocks to read."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.sparse.places import Place
from effattn_jax.sparse.pooling import Windows
from effattn_jax.typing import Array, Bool, Float


class Sizes(NamedTuple):
    """Tokens of a window, from one window to the next, and of a block."""

    kernel: int
    stride: int
    block: int


def check_sizes(sizes: Sizes) -> None:
    for name, size in zip(("kernel_size", "kernel_stride", "block_size"), sizes, strict=True):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            checks.fail(name, size, "an int of at least 1")
    for name, size in (("kernel_size", sizes.kernel), ("block_size", sizes.block)):
        if size % sizes.stride:
            checks.fail(name, size, f"a multiple of the stride of {sizes.stride}")


def window_logits(
    q: Float[Array, "B C H K"], k: Float[Array, "B W G K"], seen: Bool[Array, "#B C W"], scale: float
) -> Float[Array, "B C G R W"]:
    """scale * q . k in float32 at least, -inf for windows that a query does not see."""
    shared = q.astype(accumulation_dtype(q.dtype))
    shared = shared.reshape(*q.shape[:2], k.shape[2], q.shape[2] // k.shape[2], q.shape[3])
    s = scale * contract("bcgrk,bwgk->bcgrw", shared, k.astype(shared.dtype))
    return jnp.where(seen[:, :, None, None], s, -jnp.inf)


def log_sum_exp(s: Float[Array, "*rows W"]) -> Float[Array, "*rows 1"]:
    """-inf of nothing."""
    top = jnp.max(s, axis=-1, keepdims=True)
    floor = jnp.where(jnp.isneginf(top), 0, top)
    total = jnp.sum(jnp.exp(s - floor), axis=-1, keepdims=True)
    return jnp.where(total == 0, -jnp.inf, floor + jnp.log(jnp.where(total == 0, 1, total)))


def weights(s: Float[Array, "*rows W"]) -> Float[Array, "*rows W"]:
    """The softmax; zeros where there is nothing."""
    seen = ~jnp.isneginf(s)
    top = jnp.max(s, axis=-1, keepdims=True)
    e = jnp.where(seen, jnp.exp(jnp.where(seen, s - jnp.where(jnp.isneginf(top), 0, top), 0)), 0)
    total = jnp.sum(e, axis=-1, keepdims=True)
    return e / jnp.where(total == 0, 1, total)


def overlapping(
    p: Float[Array, "B C G W"], windows: Windows, place: Place, sizes: Sizes, blocks: int
) -> Float[Array, "B C G blocks o"]:
    """p of the windows that share a token with each block of the query's document, in order; 0 where there is none.

    Window c covers the strides c, ..., c + l / s - 1, block j the strides j b / s, ..., (j + 1) b / s - 1.
    """
    before, wide = sizes.kernel // sizes.stride - 1, sizes.block // sizes.stride
    if place.first is not None:  # windows of the documents before come first
        skip = jnp.sum(windows.document[:, None] < place.first[..., None], axis=-1)
        index = skip[..., None] + jnp.arange(p.shape[-1])
        beyond = index >= p.shape[-1]
        moved = jnp.take_along_axis(p, jnp.where(beyond, 0, index)[:, :, None], axis=-1)
        p = jnp.where(beyond[:, :, None], 0, moved)
    p = jnp.pad(p, ((0, 0), (0, 0), (0, 0), (before, max(0, blocks * wide - p.shape[-1]))))
    parts = [p[..., o : o + (blocks - 1) * wide + 1 : wide] for o in range(before + wide)]
    return jnp.stack(parts, axis=-1)


def shares(sizes: Sizes) -> Any:
    """Strides that a block has in common with each of its windows, in the order of `overlapping`: 1, 2, 2, 2, 1 for
    windows of 32 every 16 and blocks of 64."""
    kernel, wide = sizes.kernel // sizes.stride, sizes.block // sizes.stride
    return [min(o + 1, kernel, wide, kernel + wide - 1 - o) for o in range(kernel + wide - 1)]
