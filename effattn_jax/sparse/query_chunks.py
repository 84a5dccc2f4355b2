"""What is computed for each query from all of something, for some queries at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax.typing import Array

IN_FLIGHT = 2**22  # numbers of a chunk


def over_queries(of_chunk: Callable[..., Any], numbers: int, *arrays: Any) -> Any:
    """`of_chunk(*arrays)`, chunk by chunk of axis 1, the queries; it makes `numbers` numbers a query.

    What a chunk makes on the way is made again in the backward pass, not kept.
    """
    length = jax.tree.leaves(arrays)[0].shape[1]
    count = -(-length // max(1, min(length, IN_FLIGHT // max(1, numbers))))
    if count == 1:
        return jax.checkpoint(of_chunk)(*arrays)
    size = -(-length // count)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], count * size, *x.shape[3:])[:, :length]

    parts = jax.lax.map(jax.checkpoint(lambda chunk: of_chunk(*chunk), prevent_cse=False), jax.tree.map(split, arrays))
    return jax.tree.map(join, parts)
