"""How much of a memory a token keeps: the gate that Mamba-2 shares with the gated delta rules."""

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers.initializers import dt_bias, log_of_uniform
from effattn_jax.typing import Array, Float


class DecayGate(nnx.Module):
    """log_decay = -e^{A_log} softplus(x + dt_bias), or with a bound b < 0, b sigmoid(e^{A_log} (x + dt_bias)).

    One e^{A_log} per head; a dt_bias per head, or per channel of a head where there are `channels`. In float32.

    Args:
      slowest, fastest: e^{A_log} starts uniform between them; at 1 where the gate is bounded.
      lower_bound: the gate stays above it.
    """

    def __init__(
        self,
        heads: int,
        channels: int | None = None,
        *,
        slowest: float = 1.0,
        fastest: float = 16.0,
        lower_bound: float | None = None,
        rngs: nnx.Rngs,
    ):
        if lower_bound is not None and lower_bound >= 0:
            checks.fail("lower_bound", lower_bound, "None or a number below 0")
        self.heads, self.channels, self.lower_bound = heads, channels, lower_bound
        rates = log_of_uniform(rngs.params(), (heads,), slowest, fastest)
        self.A_log = nnx.Param(rates if lower_bound is None else jnp.zeros_like(rates), axes=("heads",))
        self.dt_bias = nnx.Param(dt_bias(rngs.params(), (heads * (channels or 1),)), axes=("heads",))

    def __call__(self, x: Float[Array, "B T HK"]) -> Float[Array, "B T H"] | Float[Array, "B T H K"]:
        x, rate = x.astype(jnp.float32) + self.dt_bias[...], jnp.exp(self.A_log[...])
        if self.channels is not None:
            x, rate = x.reshape(*x.shape[:-1], self.heads, self.channels), rate[:, None]
        if self.lower_bound is None:
            return -rate * jax.nn.softplus(x)
        return self.lower_bound * jax.nn.sigmoid(rate * x)
