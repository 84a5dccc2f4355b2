"""Kernels under `vmap`: the mapped axis becomes more rows of the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def fold_rows(run: Callable[..., Any], rows: tuple[int | None, ...]) -> Callable[..., Any]:
    """`run`, whose arrays and results have the batch first; under `vmap` one call with the axes folded into it.

    Args:
      rows: of each argument 0 where it has a batch axis, None where all rows share it. A shared argument that is itself
        mapped makes one call for each of its values, one after the other.
    """
    folded = jax.custom_batching.custom_vmap(run)

    @folded.def_vmap
    def over(size: int, batched: Any, *arrays: Any) -> Any:
        shared_is_batched = any(
            any(jax.tree.leaves(of)) for of, axis in zip(batched, rows, strict=True) if axis is None and of is not None
        )
        if shared_is_batched:
            spread = jax.tree.map(
                lambda x, is_batched: x if is_batched else jnp.broadcast_to(x, (size, *x.shape)), arrays, tuple(batched)
            )
            out = jax.lax.map(lambda x: run(*x), spread)
            return out, jax.tree.map(lambda _: True, out)

        def fold(x: Any, is_batched: Any) -> Any:
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        each = [
            jax.tree.map(fold, x, of) if axis == 0 else x for x, of, axis in zip(arrays, batched, rows, strict=True)
        ]
        out = fold_rows(run, rows)(*each)
        out = jax.tree.map(lambda y: y.reshape(size, -1, *y.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return folded
