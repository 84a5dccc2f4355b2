"""The feature map of a layer of linear attention, with its weights."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.linear import feature_maps
from effattn_jax.typing import Array, Float, Positions

NAMES = (
    "elu", "relu", "squared_relu", "identity", "cosformer", "taylor", "dpfp", "hedgehog", "t2r", "elementwise_product",
    "rebased",
)  # fmt: skip


class FeatureMap(nnx.Module):
    """phi(x): [B, T, H, K] -> [B, T, H, features], computed in float32; see `effattn_jax.linear.feature_maps`.

    "hedgehog" starts from the identity, W = I; "t2r" and "elementwise_product" from random matrices and zero biases;
    "rebased" from gamma = 1 and beta = 0. Each head has its own, or with `shared` all heads the same.
    """

    def __init__(
        self,
        name: str,
        heads: int,
        key_dim: int,
        *,
        feature_dim: int | None = None,
        nu: int = 1,
        max_length: int | None = None,
        shared: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if name not in NAMES:
            checks.fail("feature_map", repr(name), f"one of {', '.join(NAMES)}")
        if name == "cosformer" and (max_length is None or max_length < 1):
            checks.fail("max_length", max_length, "the most tokens of a document, for cosformer")
        if name == "dpfp" and nu < 1:
            checks.fail("nu", nu, "at least 1")
        width = key_dim if feature_dim is None else feature_dim
        heads = 1 if shared else heads
        self.name, self.nu, self.max_length, self.dtype = name, nu, max_length or 0, dtype
        self.features = {
            "cosformer": 2 * key_dim,
            "taylor": 1 + key_dim + key_dim**2,
            "dpfp": 2 * key_dim * nu,
            "hedgehog": 2 * width,
            "t2r": width,
            "elementwise_product": width,
        }.get(name, key_dim)

        def matrix() -> nnx.Param:
            draw = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
            return nnx.Param(draw(rngs.params(), (heads, key_dim, width), jnp.float32), axes=("heads", "head", "state"))

        def vector(value: float, size: int) -> nnx.Param:
            return nnx.Param(jnp.full((heads, size), value, jnp.float32), axes=("heads", "state"))

        if name == "hedgehog":
            identity = jnp.broadcast_to(jnp.eye(key_dim, width), (heads, key_dim, width))
            self.weight = nnx.Param(identity, axes=("heads", "head", "state"))
        if name in ("t2r", "elementwise_product"):
            self.weight, self.bias = matrix(), vector(0, width)
        if name == "elementwise_product":
            self.other_weight, self.other_bias = matrix(), vector(0, width)
        if name == "rebased":
            self.gamma, self.beta = vector(1, key_dim), vector(0, key_dim)

    def __call__(self, x: Float[Array, "B T H K"], positions: Positions) -> Float[Array, "B T H F"]:
        x = x.astype(jnp.float32)
        each = lambda weight: jnp.broadcast_to(weight[...], (x.shape[2], *weight.shape[1:]))  # noqa: E731
        match self.name:
            case "elu":
                y = feature_maps.elu_plus_one(x)
            case "relu":
                y = jax.nn.relu(x)
            case "squared_relu":
                y = feature_maps.squared_relu(x)
            case "cosformer":
                y = feature_maps.cosformer(x, positions, self.max_length)
            case "taylor":
                y = feature_maps.taylor(x)
            case "dpfp":
                y = feature_maps.dpfp(x, self.nu)
            case "hedgehog":
                y = feature_maps.hedgehog(x, each(self.weight))
            case "t2r":
                y = feature_maps.t2r(x, each(self.weight), each(self.bias))
            case "elementwise_product":
                weights = (self.weight, self.bias, self.other_weight, self.other_bias)
                y = feature_maps.elementwise_product(x, *map(each, weights))
            case "rebased":
                y = feature_maps.rebased(x, each(self.gamma), each(self.beta))
            case _:
                y = x
        return y.astype(self.dtype)
