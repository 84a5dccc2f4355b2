"""RWKV-6: a memory that forgets by a gate per channel (Peng et al. 2024, arXiv:2404.05892)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax.dispatch import Implementation
from effattn_jax.layers import rwkv_start
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rwkv_time_mix import Mixed, RWKVTimeMix
from effattn_jax.precision import contract
from effattn_jax.typing import Array, Hidden

MIXTURES = ("w", "k", "v", "r", "g")


class RWKV6(RWKVTimeMix):
    """The time mix ("Finch"). How much of the token before is mixed in depends on the data, through few channels: with
    d = x_{t-1} - x_t, for each of c = w, k, v, r, g:

        x_c = x_t + d * (mu_c + tanh((x_t + d * mu_x) M_c) M'_c)
        r = W_r x_r,   k = W_k x_k,   v = W_v x_v,   w_t = w + tanh(x_w A) A'
        S_t = diag(e^{-e^{w_t}}) S_{t-1} + k_t v_t^T,   o_t = S_{t-1}^T r_t + (r_t . (u * k_t)) v_t
        output = W_o (LayerNorm(o) * silu(W_g x_g))

    for every head, of N channels of each. With M' = A' = 0 it is RWKV-5, mu being the share of the other token. Weights
    start as the authors' do, by the place of the layer in the stack.

    Args:
      head_dim: N; there are dim / N heads.
      mix_rank: channels between M_c and M'_c.
      decay_rank: channels between A and A'.
      norm_eps: of the LayerNorm over each head.
      layer_index, layer_count: the place in the stack.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        mix_rank: int = 32,
        decay_rank: int = 64,
        norm_eps: float = 64e-5,
        layer_index: int | Array = 0,
        layer_count: int = 1,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            dim,
            head_dim=head_dim,
            norm_eps=norm_eps,
            layer_index=layer_index,
            layer_count=layer_count,
            dtype=dtype,
            implementation=implementation,
            rngs=rngs,
        )
        share = lambda power: 1 - rwkv_start.own_share(dim, power, layer_index, layer_count)  # noqa: E731
        small = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -0.01, 0.01)  # noqa: E731
        low_rank: dict[str, Any] = {"initializer": rwkv_start.SILENT, "dtype": dtype, "rngs": rngs}
        self.mix_rank = mix_rank
        self.mu_x = nnx.Param(share(1), axes=("embed",))
        self.mu_w = nnx.Param(share(1), axes=("embed",))
        self.mu_k = nnx.Param(share(1), axes=("embed",))
        self.mu_v = nnx.Param(share(1) - 0.3 * rwkv_start.height(layer_index, layer_count), axes=("embed",))
        self.mu_r = nnx.Param(share(0.5), axes=("embed",))
        self.mu_g = nnx.Param(share(0.5), axes=("embed",))
        self.mix_down = Projection(dim, len(MIXTURES) * mix_rank, ("embed", "state"), **low_rank)
        mix_up = small(rngs.params(), (len(MIXTURES), mix_rank, dim), jnp.float32)
        self.mix_up = nnx.Param(mix_up, axes=("mixture", "state", "embed"))
        self.w_down = Projection(dim, decay_rank, ("embed", "state"), **low_rank)
        self.w_up = Projection(decay_rank, dim, ("state", "heads"), **low_rank | {"initializer": small})

    def mixed(self, x: Hidden, before: Hidden) -> Mixed:
        d, cast = before - x, lambda mu: mu[...].astype(self.dtype)
        low = jnp.tanh(self.mix_down(x + d * cast(self.mu_x)))
        low = low.reshape(*x.shape[:2], len(MIXTURES), self.mix_rank)
        shares = contract("btcm,cmd->cbtd", low, cast(self.mix_up)).astype(self.dtype)
        mus = (self.mu_w, self.mu_k, self.mu_v, self.mu_r, self.mu_g)
        w, k, v, r, g = (x + d * (cast(mu) + share) for mu, share in zip(mus, shares, strict=True))
        return Mixed(r, k, v, g, self.w[...] + self.w_up(jnp.tanh(self.w_down(w))).astype(jnp.float32))
