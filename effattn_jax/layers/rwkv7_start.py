"""Where the weights of RWKV-7 start, by channel and by the place of the layer in the stack.

As in the authors' training code: memories from long to short over the channels of a layer and of a head, tokens mixed
less with the one before in higher layers, and every branch silent at first (output matrices 0).
"""

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from flax import nnx

from effattn_jax.layers.low_rank import LowRank
from effattn_jax.layers.projection import Projection
from effattn_jax.typing import Array, Float

if TYPE_CHECKING:
    from effattn_jax.layers.rwkv7 import RWKV7
    from effattn_jax.layers.rwkv7_channel_mix import RWKV7ChannelMix


class Place(NamedTuple):
    """In the stack, and the channels of a layer: as a line over all, as a signed square over each head."""

    height: Float[Array, ""]  # 0 in the first layer, 1 in the last
    rest: Float[Array, ""]  # 1 in the first layer, 1 / L in the last
    line: Float[Array, " D"]  # -1/2 .. 1/2
    zigzag: Float[Array, " D"]  # -1 .. 1


def place(dim: int, head_dim: int, layer_index: int | Array, layer_count: int) -> Place:
    n = jnp.arange(dim, dtype=jnp.float32)
    half = (head_dim - 1) / 2
    in_head = (n % head_dim - half) / half
    return Place(
        height=jnp.asarray(layer_index / max(layer_count - 1, 1), jnp.float32),
        rest=rest_of_stack(layer_index, layer_count),
        line=n / (dim - 1) - 0.5,
        zigzag=in_head * jnp.abs(in_head),
    )


def rest_of_stack(layer_index: int | Array, layer_count: int) -> Float[Array, ""]:
    return jnp.asarray(1 - layer_index / layer_count, jnp.float32)


def mixing(dim: int, power: Array) -> Float[Array, " D"]:
    """mu_n = 1 - (n / D)^power: the share of the token before, from all to little."""
    return 1 - (jnp.arange(dim) / dim) ** power


def start_time_mix(layer: "RWKV7", layer_index: int | Array, layer_count: int, rngs: nnx.Rngs) -> None:
    at = place(layer.value_dim, layer.head_dim, layer_index, layer_count)
    for power, mus in (
        (0.2, (layer.mu_r, layer.mu_g)),
        (0.9, (layer.mu_w, layer.mu_a)),
        (0.7, (layer.mu_k, layer.mu_v)),
    ):
        for mu in mus:
            mu[...] = mixing(layer.value_dim, power * at.rest)
    decay = -6 + 6 * (at.line + 0.5) ** (1 + at.height**0.3)
    _start_low_rank(layer.w_proj, decay + 0.5 + 2.5 * at.zigzag, rngs)
    _start_low_rank(layer.a_proj, -0.19 + 0.3 * at.zigzag + 0.4 * at.line, rngs)
    _start_low_rank(layer.v_mix, 0.73 - 0.4 * at.line, rngs)
    _start_low_rank(layer.g_proj, None, rngs)
    layer.k_k[...] = 0.71 - 0.1 * at.line
    layer.k_a[...] = jnp.full_like(at.line, 1.02)
    layer.r_k[...] = jnp.full(layer.r_k.shape, -0.04)
    layer.norm.scale[...] = jnp.full_like(at.line, ((1 + layer_index) / layer_count) ** 0.7)
    for projection, gain in ((layer.r_proj, 1), (layer.k_proj, 0.1), (layer.v_proj, 1), (layer.out_proj, 0)):
        _start_matrix(projection, gain, rngs)


def start_channel_mix(layer: "RWKV7ChannelMix", layer_index: int | Array, layer_count: int, rngs: nnx.Rngs) -> None:
    layer.mu_k[...] = mixing(layer.dim, rest_of_stack(layer_index, layer_count) ** 4)
    _start_matrix(layer.k_proj, 1, rngs)
    _start_matrix(layer.v_proj, 0, rngs)


def _start_matrix(projection: Projection, gain: float, rngs: nnx.Rngs) -> None:
    shape = projection.kernel.shape
    start = nnx.initializers.orthogonal(gain) if gain else nnx.initializers.zeros
    projection.kernel[...] = start(rngs.params(), shape, jnp.float32)


def _start_low_rank(projection: LowRank, bias: Array | None, rngs: nnx.Rngs) -> None:
    rank, dim = projection.up.kernel.shape
    _start_matrix(projection.down, 0, rngs)
    _start_matrix(projection.up, 0.1 * max(1, rank / dim) ** 0.5, rngs)
    if projection.up.bias is not None:
        projection.up.bias[...] = bias
