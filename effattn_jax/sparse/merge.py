"""Softmaxes over disjoint sets of keys, joined by their log-sum-exps; and one more logit in the denominator.

    L = ln sum_a e^{L_a}    o = sum_a e^{L_a - L} o_a

A key that several sets hold counts once in each.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp

from effattn_jax.typing import Array, Float


def merge(
    outs: Sequence[Float[Array, "B T H V"]], lses: Sequence[Float[Array, "B T H"]]
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """One softmax over all sets. A set without keys has L = -inf; where all have, o = 0 and L = -inf.

    The result has the dtypes of the first set.
    """
    top = functools.reduce(jnp.maximum, lses)
    empty = jnp.isneginf(top)
    floor = jnp.where(empty, 0, top)
    # e^{-inf} has the gradient 0 * e^{-inf} = 0, but -inf - L has none: parts without keys are cut out before
    parts = [jnp.where(jnp.isneginf(lse), 0, jnp.exp(jnp.where(jnp.isneginf(lse), 0, lse) - floor)) for lse in lses]
    total = functools.reduce(jnp.add, parts)
    total = jnp.where(empty, 1, total)
    weighted = [(part / total)[..., None] * out.astype(part.dtype) for part, out in zip(parts, outs, strict=True)]
    return functools.reduce(jnp.add, weighted).astype(outs[0].dtype), jnp.where(empty, -jnp.inf, floor + jnp.log(total))


def with_sinks(
    out: Float[Array, "B T H V"], lse: Float[Array, "B T H"], sinks: Float[Array, " H"]
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """The softmax with e^z more in its denominator: L' = ln(e^L + e^z), o' = e^{L - L'} o. Of a row without keys, 0."""
    empty = jnp.isneginf(lse)
    finite = jnp.where(empty, 0, lse)
    z = sinks.astype(lse.dtype)
    joined = jnp.where(empty, z, jnp.logaddexp(finite, z))
    share = jnp.where(empty, 0, jnp.exp(finite - joined))
    return (share[..., None] * out.astype(lse.dtype)).astype(out.dtype), joined
