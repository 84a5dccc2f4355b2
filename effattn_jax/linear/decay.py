"""Sums of logarithmic decays along a chunk, and the decay between two of its tokens.

A plain float32 sum G loses 6e-8 |G|: after a few gates of -30 the decay e^{G_i - G_j} between two mild neighbours is
off by 1e-5 and more. So a gate is split into a multiple of 1/256, whose sums are exact below 2^16, and the small rest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.typing import Array, Bool, Float

STEP = 1 / 256


class DecaySum(NamedTuple):
    """G_i = g_1 + ... + g_i along the last axis, as coarse + fine."""

    coarse: Float[Array, "... C"]
    fine: Float[Array, "... C"]

    @property
    def total(self) -> Array:
        return self.coarse + self.fine


def decay_sum(log_decay: Float[Array, "... C"]) -> DecaySum:
    coarse = jax.lax.stop_gradient(jnp.round(log_decay / STEP) * STEP)
    return DecaySum(jnp.cumsum(coarse, -1), jnp.cumsum(log_decay - coarse, -1))


def pairwise_decay(sums: DecaySum, mask: Bool[Array, "... C C"]) -> Float[Array, "... C C"]:
    """D_ij = e^{G_i - G_j} where `mask`, else 0.

    The mask comes before the exponential: above the diagonal the exponent is positive and may overflow.
    """
    coarse, fine = (x[..., :, None] - x[..., None, :] for x in sums)
    return jnp.exp(jnp.where(mask, coarse + fine, -jnp.inf))


def decay_to_end(sums: DecaySum) -> Float[Array, "... C"]:
    """e^{G_C - G_i} for every token i."""
    coarse, fine = (x[..., -1:] - x for x in sums)
    return jnp.exp(coarse + fine)
