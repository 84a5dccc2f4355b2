"""A mixture of experts in which no token is dropped (Gale et al. 2022, arXiv:2211.15841)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers.gated_mlp import GatedMLP
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.router import Router
from effattn_jax.typing import Array, Float, Hidden, Int

ACTIVATIONS = ("silu", "clamped_swiglu")
ALPHA, LIMIT = 1.702, 7.0  # of gpt-oss


class ExpertProjections(nnx.Module):
    """y_n = x_n W_e (+ b_e) for rows sorted by their expert e; W: [E, in, out]."""

    def __init__(
        self,
        experts: int,
        in_dim: int,
        out_dim: int,
        axes: tuple[str, str],
        *,
        bias: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        start = nnx.initializers.lecun_normal(batch_axis=0)
        kernel = start(rngs.params(), (experts, in_dim, out_dim), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=("experts", *axes))
        self.bias = nnx.Param(jnp.zeros((experts, out_dim), jnp.float32), axes=("experts", axes[1])) if bias else None
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "N in"], sizes: Int[Array, " E"], expert: Int[Array, " N"]
    ) -> Float[Array, "N out"]:
        """`sizes` counts the rows of each expert, `expert` names each row's."""
        y = jax.lax.ragged_dot(x.astype(self.dtype), self.kernel[...].astype(self.dtype), sizes)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)[expert]


class MoE(nnx.Module):
    """y = sum_{e in top k} p_e(x) W_down,e (silu(W_gate,e x) * W_up,e x) + shared(x).

    Rows are sorted by expert, so each product runs over the rows of its expert and no others: no capacity, no padding.

    Args:
      dim, hidden_dim: D and the hidden size of an expert.
      experts, top_k: E and k.
      score, renormalise, correction, groups, top_groups, scale: see `Router`.
      shared_dim: hidden size of a gated layer for all tokens (DeepSeekMoE, arXiv:2401.06066); 0: none.
      shared_gate: it is multiplied by sigmoid(w x) (Qwen2-MoE).
      bias: of router and experts.
      activation: "silu", or "clamped_swiglu", g sigmoid(1.702 g) (u + 1) with g below 7 and u within +-7 (gpt-oss).
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        experts: int = 8,
        top_k: int = 2,
        score: str = "softmax",
        renormalise: bool = True,
        correction: bool = False,
        groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        shared_dim: int = 0,
        shared_gate: bool = False,
        bias: bool = False,
        activation: str = "silu",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if activation not in ACTIVATIONS:
            checks.fail("activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
        if shared_gate and not shared_dim:
            checks.fail("shared_gate", True, "a shared_dim")
        self.experts, self.top_k, self.activation, self.dtype = experts, top_k, activation, dtype
        self.router = Router(
            dim,
            experts,
            top_k,
            score=score,
            renormalise=renormalise,
            correction=correction,
            groups=groups,
            top_groups=top_groups,
            scale=scale,
            bias=bias,
            rngs=rngs,
        )
        project = lambda *sizes: ExpertProjections(experts, *sizes, bias=bias, dtype=dtype, rngs=rngs)  # noqa: E731
        self.gate, self.up = (project(dim, hidden_dim, ("embed", "mlp")) for _ in range(2))
        self.down = project(hidden_dim, dim, ("mlp", "embed"))
        self.shared = GatedMLP(dim, shared_dim, dtype=dtype, rngs=rngs) if shared_dim else None
        self.shared_gate = Projection(dim, 1, ("embed", "state"), dtype=dtype, rngs=rngs) if shared_gate else None

    def __call__(self, x: Hidden) -> Hidden:
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        weights, taken = self.router(rows)
        expert = taken.reshape(-1)
        order = jnp.argsort(expert, stable=True)
        sizes, expert = jnp.bincount(expert, length=self.experts), expert[order]
        of_row = rows[order // self.top_k]
        gate, up = self.gate(of_row, sizes, expert), self.up(of_row, sizes, expert)
        y = self.down(self._activate(gate, up), sizes, expert)
        y = y[jnp.argsort(order)].reshape(len(rows), self.top_k, -1)  # back in the order of the tokens
        y = jnp.einsum("nk,nkd->nd", weights, y.astype(jnp.float32)).astype(self.dtype)
        if self.shared is not None:
            shared = self.shared(rows)
            y += shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(rows)) * shared
        return y.reshape(x.shape)

    def _activate(self, gate: Array, up: Array) -> Array:
        if self.activation == "silu":
            return jax.nn.silu(gate) * up
        gate, up = jnp.minimum(gate, LIMIT), jnp.clip(up, -LIMIT, LIMIT)
        return gate * jax.nn.sigmoid(ALPHA * gate) * (up + 1)
