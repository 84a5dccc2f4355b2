"""Queries, keys and values in heads, normed and rotated, and the way back to the residual stream."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers.norms import NORMS
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rope import rope
from effattn_jax.layers.rope_scaling import RopeScaling
from effattn_jax.typing import Array, Float, Hidden, Positions


class Heads(nnx.Module):
    """q = rope(norm(W_q x)), k = rope(norm(W_k x)), v = W_v x, and y = W_out o: what layers of softmax attention share.

    H query heads share G key/value heads (Ainslie et al. 2023, arXiv:2305.13245). Query-key norm: over each head,
    before the rotation (Dehghani et al. 2023, arXiv:2302.05442; Gemma 3).

    Args:
      dim, heads, kv_heads, head_dim: D, H, G (None: H) and K = V (None: D / H).
      qk_norm: True, or the name of a norm of `effattn_jax.layers.norms.NORMS`.
      rope_theta, rope_fraction, rope_scaling: of the rotation, see `rope`; without theta there is none.
      bias, out_bias: biases of the projections of q, k and v; of the output's.
      own_keys: False leaves out k and v: they are another layer's, see `SharedKeys`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool | str = False,
        rope_theta: float | None = 10_000.0,
        rope_fraction: float = 1.0,
        rope_scaling: RopeScaling | Mapping[str, Any] | None = None,
        bias: bool = False,
        out_bias: bool = False,
        own_keys: bool = True,
        norm_eps: float = 1e-6,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1:
            checks.fail("heads", heads, "at least 1")
        checks.check_head_groups("kv_heads", kv_heads, "the queries", heads)
        if head_dim is None and dim % heads:
            checks.fail("heads", heads, f"a divisor of dim = {dim}, or head_dim")
        head_dim = dim // heads if head_dim is None else head_dim
        rotated = int(head_dim * rope_fraction)
        if rope_theta is not None and (not 2 <= rotated <= head_dim or rotated % 2):
            checks.fail("rope_fraction", f"{rope_fraction} of head_dim {head_dim}", "an even number of channels")
        qk_norm = "rms" if qk_norm is True else qk_norm
        if qk_norm and qk_norm not in NORMS:
            checks.fail("qk_norm", repr(qk_norm), f"True, False or one of {', '.join(sorted(NORMS))}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rope_theta, self.rope_fraction, self.rope_scaling = rope_theta, rope_fraction, RopeScaling.of(rope_scaling)
        self.dtype = dtype

        project = lambda size: Projection(  # noqa: E731
            dim, size * head_dim, ("embed", "heads"), bias=bias, dtype=dtype, rngs=rngs
        )
        self.q_proj = project(heads)
        self.k_proj: Any = project(kv_heads) if own_keys else None
        self.v_proj: Any = project(kv_heads) if own_keys else None
        self.out_proj = Projection(heads * head_dim, dim, ("heads", "embed"), bias=out_bias, dtype=dtype, rngs=rngs)
        norm = lambda: NORMS[qk_norm](head_dim, eps=norm_eps, axis="head", dtype=dtype) if qk_norm else None  # noqa: E731
        self.q_norm, self.k_norm = norm(), norm() if own_keys else None

    def queries(self, x: Hidden) -> Float[Array, "B T H K"]:
        """Normed, before their rotation."""
        q = self.by_head(self.q_proj(x))
        return q if self.q_norm is None else self.q_norm(q)

    def keys(self, x: Hidden) -> Float[Array, "B T G K"]:
        """Normed, before their rotation."""
        return self.normed_key(self.k_proj(x))

    def values(self, x: Hidden) -> Float[Array, "B T G V"]:
        return self.by_head(self.v_proj(x))

    def normed_key(self, k: Float[Array, "B T GK"]) -> Float[Array, "B T G K"]:
        k = self.by_head(k)
        return k if self.k_norm is None else self.k_norm(k)

    def by_head(self, x: Float[Array, "B T HK"]) -> Float[Array, "B T H K"]:
        return x.reshape(*x.shape[:2], x.shape[2] // self.head_dim, self.head_dim)

    def rotated(self, x: Float[Array, "B T H K"], positions: Positions) -> Float[Array, "B T H K"]:
        if self.rope_theta is None:
            return x
        return rope(x, positions, theta=self.rope_theta, fraction=self.rope_fraction, scaling=self.rope_scaling)

    def joined(self, out: Float[Array, "B T H V"]) -> Hidden:
        """The heads side by side, projected."""
        return self.out_proj(out.reshape(*out.shape[:2], self.heads * self.head_dim))
