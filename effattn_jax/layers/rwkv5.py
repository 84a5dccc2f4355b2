"""RWKV-5: a memory that forgets by a constant per channel (Peng et al. 2024, arXiv:2404.05892)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn_jax.dispatch import Implementation
from effattn_jax.layers import rwkv_start
from effattn_jax.layers.rwkv_time_mix import Mixed, RWKVTimeMix
from effattn_jax.typing import Array, Hidden


class RWKV5(RWKVTimeMix):
    """The time mix ("Eagle"). With x_c = mu_c * x_t + (1 - mu_c) * x_{t-1} for each of c = r, k, v, g:

        r = W_r x_r,   k = W_k x_k,   v = W_v x_v
        S_t = diag(e^{-e^w}) S_{t-1} + k_t v_t^T,   o_t = S_{t-1}^T r_t + (r_t . (u * k_t)) v_t
        output = W_o (LayerNorm(o) * silu(W_g x_g))

    for every head, of N channels of each; w and u are learned, a number per channel. Weights start as the authors' do,
    by the place of the layer in the stack.

    Args:
      head_dim: N; there are dim / N heads.
      norm_eps: of the LayerNorm over each head.
      layer_index, layer_count: the place in the stack.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
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
        share = lambda power: rwkv_start.own_share(dim, power, layer_index, layer_count)  # noqa: E731
        self.mu_r = nnx.Param(share(0.5), axes=("embed",))
        self.mu_k = nnx.Param(share(1), axes=("embed",))
        self.mu_v = nnx.Param(share(1) + 0.3 * rwkv_start.height(layer_index, layer_count), axes=("embed",))
        self.mu_g = nnx.Param(share(0.5), axes=("embed",))

    def mixed(self, x: Hidden, before: Hidden) -> Mixed:
        mixed = lambda mu: before + (x - before) * mu[...].astype(self.dtype)  # noqa: E731
        return Mixed(mixed(self.mu_r), mixed(self.mu_k), mixed(self.mu_v), mixed(self.mu_g), self.w[...])
