"""The inner model of test-time training, its loss on one token, and the gradient of that loss, by hand.

    f(x) = x W + b,  or  gelu(x W1 + b1) W2 + b2            loss = 1/2 |LN(f(k)) - (v - k)|^2

A gradient of a layer's weights is x^T G, with x what the layer read and G the gradient at what it returned: it is kept
as that pair of vectors. All of it can be differentiated again.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.precision import contract
from effattn_jax.typing import Array, Float

EPSILON = 1e-6


class Affine(NamedTuple):
    """x -> x W + b for every head; or a gradient with respect to the two."""

    W: Float[Array, "*batch H I O"]
    b: Float[Array, "*batch H O"]

    def __call__(self, x: Float[Array, "B H C I"]) -> Float[Array, "B H C O"]:
        return contract("...ci,...io->...co", x, self.W) + self.b[..., None, :]


Network = tuple[Affine, ...]


class InnerNorm(NamedTuple):
    """LN(z) = scale * (z - mean) / sqrt(var + 1e-6) + bias, for every head."""

    scale: Float[Array, "H K"]
    bias: Float[Array, "H K"]

    def __call__(self, z: Float[Array, "B H C K"]) -> Float[Array, "B H C K"]:
        return self.scale[:, None] * _normalize(z)[0] + self.bias[:, None]

    def loss_gradient(self, z: Float[Array, "B H C K"], target: Float[Array, "B H C K"]) -> Float[Array, "B H C K"]:
        """Of 1/2 |LN(z) - target|^2. With h = (z - mean) / s and u the gradient at h:

        dz = (u - mean(u) - h mean(u * h)) / s
        """
        h, s = _normalize(z)
        u = self.scale[:, None] * (self.scale[:, None] * h + self.bias[:, None] - target)
        mean = lambda x: jnp.mean(x, axis=-1, keepdims=True)  # noqa: E731
        return (u - mean(u) - h * mean(u * h)) / s


def _normalize(z: Array) -> tuple[Array, Array]:
    z = z - jnp.mean(z, axis=-1, keepdims=True)
    s = jnp.sqrt(jnp.mean(jnp.square(z), axis=-1, keepdims=True) + EPSILON)
    return z / s, s


def gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def gelu_slope(x: Array) -> Array:
    """Derivative of gelu(x) = x/2 (1 + tanh(c (x + a x^3)))."""
    c, a = (2 / jnp.pi) ** 0.5, 0.044715
    t = jnp.tanh(c * (x + a * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * a * x * x)


def activations(layers: Sequence[Affine | Callable[[Array], Array]], x: Array) -> tuple[list[Array], list[Array]]:
    """What each layer reads and what it returns, with gelu between layers."""
    reads, returns = [x], []
    for layer in layers:
        returns.append(layer(reads[-1]))
        reads.append(gelu(returns[-1]))
    return reads[:-1], returns


class Gradient(NamedTuple):
    """Gradients of a layer's weights for C tokens, x_j^T G_j, and of its bias, G_j."""

    x: Float[Array, "B H C I"]
    G: Float[Array, "B H C O"]

    def total(self, rate: Float[Array, "B H C"]) -> Affine:
        """sum_j rate_j x_j^T G_j."""
        G = rate[..., None] * self.G
        return Affine(contract("...ci,...co->...io", self.x, G), jnp.sum(G, axis=-2))

    def moved(self, x: Float[Array, "B H C I"], rate: Float[Array, "B H C C"]) -> Float[Array, "B H C O"]:
        """What sum_j rate_ij (x_j^T G_j, G_j), as an affine map, makes of x_i."""
        scores = contract("...ci,...ji->...cj", x, self.x) + 1
        return contract("...cj,...jo->...co", rate * scores, self.G)


def loss_gradients(network: Network, norm: InnerNorm, k: Array, v: Array) -> tuple[Gradient, ...]:
    """Of each layer of the network, for every token on its own."""
    reads, returns = activations(network, k)
    G = norm.loss_gradient(returns[-1], v - k)
    gradients = [Gradient(reads[-1], G)]
    for layer, x, z in zip(reversed(network[1:]), reversed(reads[:-1]), reversed(returns[:-1]), strict=True):
        G = contract("...co,...io->...ci", G, layer.W) * gelu_slope(z)
        gradients.append(Gradient(x, G))
    return tuple(reversed(gradients))
