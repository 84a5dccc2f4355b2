"""A Triton kernel called on the arrays of JAX."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Size(NamedTuple):
    """What one program works on, and how."""

    block_k: int  # channels of q and k
    block_v: int  # channels of v
    warps: int
    stages: int  # passes of a loop whose loads are under way


def launch(
    kernel: Any,
    programs: int,
    out: Sequence[jax.ShapeDtypeStruct],
    arrays: Sequence[jax.Array],
    size: Size,
    **constants: Any,
) -> list[jax.Array]:
    """`kernel(*arrays, *outputs, **constants)` by that many programs. The kernel fills every element of `out`."""
    import jax_triton

    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_shape=list(out),
        grid=(programs, 1, 1),
        num_warps=size.warps,
        num_stages=size.stages,
        **constants,
    )


def precision(dtype: Any) -> str:
    """Of products: of float32 in three products of tf32 where there are any, which leaves errors near 1e-6."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    tf32 = capability.replace(".", "").isdecimal() and float(capability) >= 8
    return "tf32x3" if dtype == jnp.float32 and tf32 else "ieee"


def over_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays that begin with an axis of rows, which takes the axes of `vmap` in."""
    run = jax.custom_batching.custom_vmap(function)

    @run.def_vmap
    def over(size: int, batched: Any, *arrays: Any) -> Any:
        def rows(array: jax.Array, is_batched: bool) -> jax.Array:
            array = array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        out = over_rows(function)(*jax.tree.map(rows, arrays, tuple(batched)))
        split = jax.tree.map(lambda y: y.reshape(size, -1, *y.shape[1:]), out)
        return split, jax.tree.map(lambda _: True, split)

    return run
