"""Feature maps phi: the kernel phi(q) . phi(k) takes the place of e^{q . k} in linear attention.

Each maps the last axis of [..., K]; those with weights have one set for each of H heads: [..., H, K].
"""

import math

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.typing import Array, Float, Positions

HeadWeights = Float[Array, "H K F"]


def elu_plus_one(x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """x + 1 above 0, e^x below (Katharopoulos et al. 2020, arXiv:2006.16236)."""
    return jax.nn.elu(x) + 1


def squared_relu(x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    return jnp.square(jax.nn.relu(x))


def cosformer(x: Float[Array, "B T H K"], positions: Positions, max_length: int) -> Float[Array, "B T H 2K"]:
    """[relu(x) sin(pi i / 2M), relu(x) cos(pi i / 2M)] at position i (cosFormer; Qin et al. 2022, arXiv:2202.08791).

    The kernel is relu(q_i) . relu(k_j) cos(pi (i - j) / 2M), not negative where |i - j| <= M = `max_length`.
    """
    angles = (math.pi / (2 * max_length)) * positions.astype(jnp.float32)[:, :, None, None]
    x = jax.nn.relu(x)
    return jnp.concatenate([x * jnp.sin(angles).astype(x.dtype), x * jnp.cos(angles).astype(x.dtype)], axis=-1)


def taylor(x: Float[Array, "*batch K"]) -> Float[Array, "*batch F"]:
    """[1, x / K^{1/4}, vec(x x^T) / sqrt(2 K)], F = 1 + K + K^2 (Based; Arora et al. 2024, arXiv:2402.18668).

    The kernel is 1 + s + s^2 / 2 with s = q . k / sqrt(K), the second-order Taylor polynomial of e^s.
    """
    x = x * x.shape[-1] ** -0.25
    pairs = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], x.shape[-1] ** 2)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, pairs * 2**-0.5], axis=-1)


def hedgehog(x: Float[Array, "*batch H K"], weight: HeadWeights) -> Float[Array, "*batch H 2F"]:
    """softmax([x W, -x W]) (Hedgehog; Zhang et al. 2024, arXiv:2402.04347)."""
    y = _per_head(x, weight)
    return jax.nn.softmax(jnp.concatenate([y, -y], axis=-1).astype(jnp.float32), axis=-1).astype(x.dtype)


def t2r(x: Float[Array, "*batch H K"], weight: HeadWeights, bias: Float[Array, "H F"]) -> Float[Array, "*batch H F"]:
    """relu(x W + b) (T2R; Kasai et al. 2021, arXiv:2103.13076)."""
    return jax.nn.relu(_per_head(x, weight) + bias.astype(x.dtype))


def elementwise_product(
    x: Float[Array, "*batch H K"],
    first: HeadWeights,
    first_bias: Float[Array, "H F"],
    second: HeadWeights,
    second_bias: Float[Array, "H F"],
) -> Float[Array, "*batch H F"]:
    """(x W + b) * (x W' + b'), a Hadamard product of two linear maps."""
    y, z = _per_head(x, first) + first_bias.astype(x.dtype), _per_head(x, second) + second_bias.astype(x.dtype)
    return y * z


def rebased(
    x: Float[Array, "*batch H K"], gamma: Float[Array, "H K"], beta: Float[Array, "H K"], eps: float = 1e-5
) -> Float[Array, "*batch H K"]:
    """(gamma norm(x) + beta)^2 with the layer norm of x (ReBased; Aksenov et al. 2024, arXiv:2402.10644)."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return jnp.square(gamma * y + beta).astype(x.dtype)


def dpfp(x: Float[Array, "*batch K"], nu: int = 1) -> Float[Array, "*batch F"]:
    """concat over i = 1 .. nu of r * roll(r, i) with r = [relu(x), relu(-x)], F = 2 K nu (Schlag et al. 2021,
    arXiv:2102.11174)."""
    if nu < 1:
        checks.fail("nu", nu, "at least 1")
    r = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
    return jnp.concatenate([r * jnp.roll(r, i, axis=-1) for i in range(1, nu + 1)], axis=-1)


def sum_normalise(phi: Float[Array, "*batch F"], eps: float = 1e-5) -> Float[Array, "*batch F"]:
    """phi / (sum phi + eps), in float32: what a memory with the delta rule needs to stay bounded (Schlag et al.)."""
    y = phi.astype(jnp.float32)
    return (y / (jnp.sum(y, axis=-1, keepdims=True) + eps)).astype(phi.dtype)


def _per_head(x: Array, weight: Array) -> Array:
    return jnp.einsum("...hk,hkf->...hf", x, weight.astype(x.dtype), precision="highest")
