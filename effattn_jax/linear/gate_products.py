"""Products of gates along a window, for gates that may be exactly 0 or 1 and are not given as logarithms.

No logarithm, quotient or exponential: an exact 0 cuts what is before it and keeps its gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.typing import Array, Bool, Float


class GateProducts(NamedTuple):
    """Products over the tokens r of t's document up to t: of those after s, and of all of them."""

    after: Float[Array, "... C C"]  # [t, s] = prod_{s < r <= t} gate_r for s <= t, else 0
    whole: Float[Array, "... C"]


def gate_products(gate: Float[Array, "... C"], mask: Bool[Array, "... C C"]) -> GateProducts:
    """`mask` [t, s]: s is a token of t's document, up to t. Gates of padding are 1."""
    later = jnp.tril(jnp.ones(mask.shape[-2:], bool), -1)
    after = jax.lax.cumprod(jnp.where(later, gate[..., :, None], 1), axis=gate.ndim - 1)
    whole = jnp.prod(jnp.where(mask, gate[..., None, :], 1), axis=-1)
    return GateProducts(jnp.where(mask, after, 0), whole)
