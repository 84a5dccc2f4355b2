"""The inverse of a unit lower triangular matrix: what tokens of a chunk have done to each other, in one product.

Substitution in diagonal blocks of 16, which are merged 16 -> 32 -> 64 -> ... The entries of the inverse are benign even
where keys are alike and beta = 2; a product (I - L)(I + L^2)(I + L^4)... passes through powers that are not.
"""

import jax
import jax.numpy as jnp

from effattn_jax.precision import contract
from effattn_jax.typing import Array, Float

BLOCK = 16


@jax.custom_jvp
def unit_lower_inverse(lower: Float[Array, "... C C"]) -> Float[Array, "... C C"]:
    """(I + L)^{-1}, where L is the part of `lower` strictly below the diagonal; C is any size."""
    size = lower.shape[-1]
    block = min(BLOCK, size)
    whole = block
    while whole < size:
        whole *= 2
    padding = [(0, 0)] * (lower.ndim - 2) + [(0, whole - size)] * 2
    lower = jnp.pad(jnp.tril(lower, -1), padding)
    inverse = _substitute(_diagonal_blocks(lower, block))
    while block < whole:
        block *= 2
        inverse = _merge(inverse, _diagonal_blocks(lower, block)[..., block // 2 :, : block // 2])
    return inverse[..., 0, :size, :size]


@unit_lower_inverse.defjvp
def _jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """dX = -X dL X."""
    inverse = unit_lower_inverse(*primals)
    change = contract("...ij,...jk->...ik", jnp.tril(tangents[0], -1), inverse)
    return inverse, -contract("...ij,...jk->...ik", inverse, change)


def _diagonal_blocks(x: Float[Array, "... M M"], size: int) -> Float[Array, "... N C C"]:
    blocks = x.reshape(*x.shape[:-2], x.shape[-1] // size, size, x.shape[-1] // size, size)
    return jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)


def _substitute(lower: Float[Array, "... C C"]) -> Float[Array, "... C C"]:
    """Row by row from the top: once row j is done, what it adds to the rows below it is taken from them."""
    size = lower.shape[-1]

    def eliminate(j: Array, x: Array) -> Array:
        row, column = jax.lax.dynamic_slice_in_dim(x, j, 1, -2), jax.lax.dynamic_slice_in_dim(lower, j, 1, -1)
        return x - column * row

    return jax.lax.fori_loop(0, size - 1, eliminate, jnp.eye(size, dtype=lower.dtype) + jnp.zeros_like(lower))


def _merge(inverse: Float[Array, "... 2N C C"], below: Float[Array, "... N C C"]) -> Float[Array, "... N 2C 2C"]:
    """[[A, 0], [B, D]]^{-1} = [[A^{-1}, 0], [-D^{-1} B A^{-1}, D^{-1}]]."""
    top, bottom = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
    corner = -contract("...ij,...jk->...ik", bottom, contract("...ij,...jk->...ik", below, top))
    above = jnp.concatenate([top, jnp.zeros_like(top)], -1)
    return jnp.concatenate([above, jnp.concatenate([corner, bottom], -1)], -2)
