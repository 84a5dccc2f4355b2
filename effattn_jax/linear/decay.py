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
    """G_i = g_1 + ... + g_i along the last axis as rate steps_i + fine_i, and G_C - G_i = g_{i+1} + ... + g_C."""

    rate: Float[Array, "... 1"]
    steps: Float[Array, "... C"]  # whole numbers, exact
    fine: Float[Array, "... C"]
    to_end: Float[Array, "... C"]

    @property
    def total(self) -> Array:
        return self.rate * self.steps + self.fine


def decay_sum(log_decay: Float[Array, "... C"]) -> DecaySum:
    """Of a gate per token."""
    whole = jax.lax.stop_gradient(jnp.round(log_decay / STEP))
    steps, fine = jnp.cumsum(whole, -1), log_decay - whole * STEP
    # Summed from the end: fine_C - fine_i would give the gate of the last token a gradient that only rounding cancels.
    after = jnp.concatenate([fine[..., 1:], jnp.zeros_like(fine[..., :1])], -1)
    to_end = STEP * (steps[..., -1:] - steps) + jax.lax.cumsum(after, after.ndim - 1, reverse=True)
    return DecaySum(jnp.full(1, STEP, fine.dtype), steps, jnp.cumsum(fine, -1), to_end)


def constant_decay_sum(log_decay: Float[Array, "... 1"], real: Bool[Array, "... C"]) -> DecaySum:
    """Of one gate for all real tokens: its gradient is a sum over pairs, without differences of large sums."""
    steps = jnp.cumsum(real, -1, dtype=log_decay.dtype)
    return DecaySum(log_decay, steps, jnp.zeros_like(log_decay), log_decay * (steps[..., -1:] - steps))


def pairwise_exponent(sums: DecaySum) -> Float[Array, "... C C"]:
    """G_i - G_j, meant for j <= i.

    On the diagonal it is the constant 0: under strong gates the rest of D is small, and two gradients of its size
    cancel to noise.
    """
    steps, fine = (x[..., :, None] - x[..., None, :] for x in (sums.steps, sums.fine))
    return jnp.where(jnp.eye(steps.shape[-1], dtype=bool), 0, sums.rate[..., None] * steps + fine)


def pairwise_decay(sums: DecaySum, mask: Bool[Array, "... C C"]) -> Float[Array, "... C C"]:
    """D_ij = e^{G_i - G_j} where `mask`, else 0.

    The mask comes before the exponential: above the diagonal the exponent is positive and may overflow.
    """
    return jnp.exp(jnp.where(mask, pairwise_exponent(sums), -jnp.inf))
