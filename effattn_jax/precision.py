"""What is accumulated in what: states, sums of gates and products in float32 at least."""

from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax.typing import Array


def accumulation_dtype(dtype: Any) -> Any:
    """float32, or float64 where the inputs are float64."""
    return jnp.promote_types(dtype, jnp.float32)


def contract(equation: str, *operands: Array) -> Array:
    """`einsum` of operands of one dtype, accumulated in float32.

    Full float32 products for float32 operands: an accelerator would round them to TF32 or bfloat16 by default.
    """
    dtype = jnp.result_type(*operands)
    precision = jax.lax.Precision.DEFAULT if dtype.itemsize < 4 else jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, *operands, precision=precision, preferred_element_type=accumulation_dtype(dtype))


def zeros_varying(shape: tuple[int, ...], dtype: Any, *like: Array) -> Array:
    """Zeros that vary over the same manual mesh axes as `like`: a carry of `lax.scan` under `shard_map` needs it."""
    return sum((jnp.zeros_like(array, shape=shape, dtype=dtype) for array in like), jnp.zeros(shape, dtype))
