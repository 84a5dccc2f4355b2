"""Products of gates along a window, for gates that may be exactly 0 or 1 and are not given as logarithms.

No logarithm, quotient or exponential: an exact 0 cuts what is before it and keeps its gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.precision import zeros_varying
from effattn_jax.typing import Array, Bool, Float


class GateProducts(NamedTuple):
    """Products over the tokens r of t's document up to t: of those after s, and of all of them in the window."""

    after: Float[Array, "... C C"]  # [t, s] = prod_{s < r <= t} gate_r for s <= t, else 0
    whole: Float[Array, "... C"]


def gate_products(
    gate: Float[Array, "... C"], mask: Bool[Array, "... C C"], begins: Bool[Array, "... C"]
) -> GateProducts:
    """`mask` [t, s]: s is a token of t's document, up to t. `begins`: its first token. Gates of padding are 1."""
    size = gate.shape[-1]
    after = zeros_varying(gate.shape, gate.dtype, gate, begins)
    whole = after[..., 0] + 1

    def step(
        before: tuple[Array, Array], token: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        (after, whole), (g, begin, own) = before, token
        following = g[..., None] * after + own, g * jnp.where(begin, 1, whole)
        return following, following

    tokens = (jnp.moveaxis(gate, -1, 0), jnp.moveaxis(begins, -1, 0), jnp.eye(size, dtype=gate.dtype))
    _, (after, whole) = jax.lax.scan(step, (after, whole), tokens)
    return GateProducts(jnp.where(mask, jnp.moveaxis(after, 0, -2), 0), jnp.moveaxis(whole, 0, -1))
