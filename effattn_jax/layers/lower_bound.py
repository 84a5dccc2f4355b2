"""Lower bounds of forget gates that rise with depth (HGRN; Qin et al. 2023, arXiv:2311.04823)."""

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax.typing import Array, Float, Int


def bound_logits(layer_count: int, channels: int) -> nnx.Param:
    """The logits [L, D] of all layers, where they start: equal shares."""
    return nnx.Param(jnp.zeros((layer_count, channels), jnp.float32), axes=("depth", "heads"))


def lower_bound(
    logits: Float[Array, "L D"], layer_index: Int[Array, ""] | Float[Array, ""] | int
) -> Float[Array, " D"]:
    """gamma_l = P_1 + ... + P_l with P = softmax over the L layers: 0 in layer 0, below 1 in the last."""
    layer = jnp.arange(logits.shape[0])
    counted = (layer > 0) & (layer <= layer_index)
    return jnp.sum(jax.nn.softmax(logits, axis=0) * counted[:, None], axis=0)


def log_forget_gate(f: Float[Array, "*batch D"], gamma: Float[Array, " D"]) -> Float[Array, "*batch D"]:
    """log(gamma + (1 - gamma) sigmoid(f)) for 0 <= gamma <= 1, in float32.

    It is log(gamma + e^f) - log(1 + e^f), here with e^{max(f, 0)} taken out of both, so that nothing overflows and
    nothing cancels. gamma = 0 gives log sigmoid(f), and gamma no gradient.
    """
    f = f.astype(jnp.float32)
    log_gamma = jnp.where(gamma > 0, jnp.log(jnp.where(gamma > 0, gamma, 1)), -jnp.inf)
    below, above = jnp.where(f > 0, 0, f), jnp.where(f > 0, f, 0)
    return jnp.logaddexp(below, log_gamma - above) - jnp.log1p(jnp.exp(below - above))
