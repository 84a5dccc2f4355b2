"""A memory that is a small network without biases, the loss of what it says to one token, and the gradient of that
loss, by hand, so that it can be differentiated again.

    z_1 = x M_1,  z_2 = f(z_1) M_2,  ...        loss(M; k, v) = c/2 |z_L - v|^2        c = 2 for |M(k) - v|^2

A gradient of a layer's matrix is x^T delta, with x what the layer read and delta the gradient at what it returned: it
is kept as that pair of vectors.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.linear.inner_loss import InnerNorm, gelu
from effattn_jax.precision import contract
from effattn_jax.typing import Array, Float

Network = tuple[Float[Array, "*batch H I O"], ...]
Layer = Callable[[Array], Array]

ACTIVATIONS = {"gelu": gelu, "silu": jax.nn.silu}


class Loss(NamedTuple):
    """c/2 |M(k) - v|^2; with a norm c/2 |LN(M(k)) - (v - k)|^2."""

    activation: str
    scale: float
    norm: InnerNorm | None

    def gradient(self, z: Float[Array, "B H C V"], k: Array, v: Array) -> Float[Array, "B H C V"]:
        """At z = M(k)."""
        return self.scale * (z - v if self.norm is None else self.norm.loss_gradient(z, v - k))


class Gradient(NamedTuple):
    """Of a layer's matrix for each of C tokens, x_i^T delta_i."""

    x: Float[Array, "B H C I"]
    delta: Float[Array, "B H C O"]

    def total(self, rate: Float[Array, "B H C"]) -> Float[Array, "B H I O"]:
        """sum_i rate_i x_i^T delta_i."""
        return contract("...ci,...co->...io", self.x, rate[..., None] * self.delta)

    def moved(self, x: Float[Array, "B H C I"], rate: Float[Array, "B H C C"]) -> Float[Array, "B H C O"]:
        """x_t sum_i rate_ti x_i^T delta_i."""
        scores = contract("...ti,...ci->...tc", x, self.x)
        return contract("...tc,...co->...to", rate * scores, self.delta)


def matrices(network: Network) -> list[Layer]:
    return [functools.partial(_product, w) for w in network]


def _product(w: Array, x: Array) -> Array:
    return contract("...ci,...io->...co", x, w)


def passes(layers: Sequence[Layer], x: Array, activation: str) -> tuple[list[Array], list[Array]]:
    """What each layer reads and what it returns."""
    reads, returns = [x], []
    for layer in layers:
        returns.append(layer(reads[-1]))
        reads.append(ACTIVATIONS[activation](returns[-1]))
    return reads[:-1], returns


def read(layers: Sequence[Layer], q: Array, activation: str) -> Array:
    """M(q)."""
    return passes(layers, q, activation)[1][-1]


def loss_gradients(network: Network, loss: Loss, k: Array, v: Array) -> tuple[Gradient, ...]:
    """Of each layer, for every token on its own: delta_l = (delta_{l+1} M_{l+1}^T) * f'(z_l)."""
    reads, returns = passes(matrices(network), k, loss.activation)
    delta = loss.gradient(returns[-1], k, v)
    gradients = [Gradient(reads[-1], delta)]
    for w, x, z in zip(reversed(network[1:]), reversed(reads[:-1]), reversed(returns[:-1]), strict=True):
        slope = jax.jvp(ACTIVATIONS[loss.activation], (z,), (jnp.ones_like(z),))[1]
        delta = contract("...co,...io->...ci", delta, w) * slope
        gradients.append(Gradient(x, delta))
    return tuple(reversed(gradients))
