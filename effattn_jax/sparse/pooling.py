"""Windows of consecutive tokens of a document, and the means over them.

Window c of a document holds its tokens c s, ..., c s + l - 1 (length l, stride s <= l), and is there once it is
complete. Blocks are windows with l = s. A row of M tokens has at most M // s windows, whatever documents it holds.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.precision import accumulation_dtype
from effattn_jax.sparse.documents import first_tokens, real_only
from effattn_jax.sparse.places import Place
from effattn_jax.typing import Array, Bool, Float, Int


class Windows(NamedTuple):
    """Ascending in each row; rows that are alike are one, which broadcasts."""

    start: Int[Array, "#B W"]
    valid: Bool[Array, "#B W"]  # there is such a window, with a real token in it
    document: Int[Array, "#B W"]  # first token of its document; M behind the last window


def check_windows(length: int, stride: int) -> None:
    for name, size in (("kernel_size", length), ("kernel_stride", stride)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            checks.fail(name, size, "an int of at least 1")
    if length < stride:
        checks.fail("kernel_size", length, f"at least the stride of {stride}")


def complete_windows(keys: int, length: int, stride: int, segment_ids: Int[Array, "B M"] | None = None) -> Windows:
    """All complete windows of rows of M = `keys` tokens. Padding counts as a place, not as a token."""
    check_windows(length, stride)
    if segment_ids is None:
        start = stride * jnp.arange(max(1, (keys - length) // stride + 1))[None]
        valid = start + length <= keys
        return Windows(start, valid, jnp.where(valid, 0, keys))
    segment_ids = jnp.asarray(segment_ids)
    first = first_tokens(segment_ids)
    age = jnp.arange(keys) - first - (length - 1)
    ends = (age >= 0) & (age % stride == 0)
    size = max(1, keys // stride)
    end = jax.vmap(lambda row: jnp.nonzero(row, size=size, fill_value=keys)[0])(ends)
    exists = end < keys
    end = jnp.minimum(end, keys - 1)
    start = jnp.maximum(end - length + 1, 0)
    before = jnp.pad(jnp.cumsum(segment_ids >= 0, axis=1), ((0, 0), (1, 0)))
    tokens = jnp.take_along_axis(before, end + 1, axis=1) - jnp.take_along_axis(before, start, axis=1)
    document = jnp.where(exists, jnp.take_along_axis(first, end, axis=1), keys)
    return Windows(start, exists & (tokens > 0), document)


def visible(windows: Windows, length: int, place: Place) -> Bool[Array, "#B T W"]:
    """Windows of the query's document that end at the query or before."""
    end = (windows.start - windows.document + length - 1)[:, None]
    seen = windows.valid[:, None] & (end <= place.relative[..., None])
    return seen if place.first is None else seen & (windows.document[:, None] == place.first[..., None])


def window_tokens(x: Float[Array, "B M ..."], windows: Windows, length: int) -> Float[Array, "B W l ..."]:
    """The tokens of every window side by side; l / s numbers for each one of x."""
    index = jnp.minimum(windows.start[..., None] + jnp.arange(length), x.shape[1] - 1)
    if index.shape[0] == 1:
        return x[:, index[0]]
    return jax.vmap(lambda row, i: row[i])(x, index)


def mean_pool(
    x: Float[Array, "B M ..."],
    windows: Windows,
    length: int,
    stride: int,
    segment_ids: Int[Array, "B M"] | None = None,
) -> Float[Array, "B W ..."]:
    """Means over the real tokens of `complete_windows(M, length, stride, segment_ids)`, in float32 at least."""
    keys = x.shape[1]
    accumulate = accumulation_dtype(x.dtype)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        real = window_tokens(segment_ids >= 0, windows, length)
        total = jnp.sum(window_tokens(real_only(x, segment_ids), windows, length), axis=2, dtype=accumulate)
        count = jnp.maximum(jnp.sum(real, axis=2), 1).reshape(*real.shape[:2], *(1,) * (x.ndim - 2))
        return total / count.astype(accumulate)
    if keys < length or length % stride:
        return jnp.mean(window_tokens(x, windows, length), axis=2, dtype=accumulate)
    strides, size = keys // stride, (keys - length) // stride + 1
    parts = x[:, : strides * stride].reshape(x.shape[0], strides, stride, *x.shape[2:])
    sums = jnp.sum(parts, axis=2, dtype=accumulate)
    return functools.reduce(jnp.add, [sums[:, n : n + size] for n in range(length // stride)]) / length
