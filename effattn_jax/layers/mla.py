"""Multi-head latent attention: keys and values of all heads from one narrow vector (DeepSeek-V2, arXiv:2405.04434)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.layers.rope import rope
from effattn_jax.layers.rope_scaling import RopeScaling
from effattn_jax.sparse import LatentCache, attention, cached_latent_attention, init_latent_cache
from effattn_jax.typing import Array, Float, Hidden, Positions, SegmentIds


class LatentAttention(nnx.Module):
    """c = RMSNorm(W_c x) of R channels, r = rope(W_r x) that all heads share; for every head h

        k = [W_k,h c, r],   v = W_v,h c,   q = [q_nope, rope(q_rope)] = W_q,h x or W_q,h RMSNorm(W_a x)
        o = softmax(scale q k^T + causal mask) v

    Only c and r are cached. With a cache W_k,h goes into the query and W_v,h into the output, so heads read c itself
    and no key or value is ever made.

    Args:
      dim, heads: D and H.
      latent_dim: R.
      query_rank: channels that queries go through; None: none.
      key_dim, rope_dim, value_dim: channels of a head without positions, with positions, and of its values.
      rope_theta: None turns nothing: `rope_dim` channels are kept as they are (Kimi Linear).
      rope_scaling, rope_interleaved: see `rope`.
      scale: of the scores; None is (key_dim + rope_dim)^-1/2.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        latent_dim: int = 512,
        query_rank: int | None = None,
        key_dim: int = 128,
        rope_dim: int = 64,
        value_dim: int = 128,
        rope_theta: float | None = 10_000.0,
        rope_scaling: RopeScaling | Mapping[str, Any] | None = None,
        rope_interleaved: bool = False,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        for name, size in (
            ("heads", heads),
            ("latent_dim", latent_dim),
            ("key_dim", key_dim),
            ("value_dim", value_dim),
        ):
            if size < 1:
                checks.fail(name, size, "at least 1")
        if rope_dim < 1 or rope_dim % 2:
            checks.fail("rope_dim", rope_dim, "an even number of channels")
        self.heads, self.latent_dim, self.key_dim, self.rope_dim = heads, latent_dim, key_dim, rope_dim
        self.value_dim, self.rope_theta, self.rope_interleaved = value_dim, rope_theta, rope_interleaved
        self.rope_scaling = RopeScaling.of(rope_scaling)
        self.scale = (key_dim + rope_dim) ** -0.5 if scale is None else scale
        self.dtype, self.implementation = dtype, implementation

        project = lambda inner, outer, axes: Projection(inner, outer, axes, dtype=dtype, rngs=rngs)  # noqa: E731
        norm = lambda size: RMSNorm(size, eps=norm_eps, axis="state", dtype=dtype)  # noqa: E731
        queries = heads * (key_dim + rope_dim)
        self.q_down = project(dim, query_rank, axes=("embed", "state")) if query_rank else None
        self.q_norm = norm(query_rank) if query_rank else None
        self.q_proj = project(query_rank or dim, queries, axes=("state" if query_rank else "embed", "heads"))
        self.kv_down = project(dim, latent_dim + rope_dim, axes=("embed", "state"))
        self.kv_norm = norm(latent_dim)
        self.kv_up = project(latent_dim, heads * (key_dim + value_dim), axes=("state", "heads"))
        self.out_proj = project(heads * value_dim, dim, axes=("heads", "embed"))

    def init_state(self, batch_size: int, max_length: int) -> LatentCache:
        """A cache of `max_length` tokens, `latent_dim` + `rope_dim` numbers each."""
        return init_latent_cache(batch_size, max_length, self.latent_dim + self.rope_dim, dtype=self.dtype)

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections, on average over a causal row."""
        return 2 * self.heads * (self.key_dim + self.rope_dim + self.value_dim) * (length + 1) / 2

    def __call__(
        self,
        x: Hidden,
        state: LatentCache | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, LatentCache | None]:
        """`positions` [B, T] turn queries and keys; None counts on from the tokens in the cache."""
        if positions is None:
            positions = (0 if state is None else state.length) + jnp.arange(x.shape[1])[None]
        q = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q = self.q_proj(q).reshape(*x.shape[:2], self.heads, -1)
        q, q_rope = q[..., : self.key_dim], self._turned(q[..., self.key_dim :], positions)
        down = self.kv_down(x)
        c, r = self.kv_norm(down[..., : self.latent_dim]), down[..., self.latent_dim :]
        r = self._turned(r[:, :, None], positions)
        if state is None:
            out = self._expanded(q, q_rope, c, r, segment_ids)
        else:
            to_key, to_value = self._up()
            latent_q = jnp.concatenate([jnp.einsum("bthk,rhk->bthr", q, to_key), q_rope], axis=-1)
            read, state = cached_latent_attention(
                latent_q,
                jnp.concatenate([c, r[:, :, 0]], axis=-1),
                state,
                value_dim=self.latent_dim,
                scale=self.scale,
                segment_ids=segment_ids,
                implementation=self.implementation,
            )
            out = jnp.einsum("bthr,rhv->bthv", read, to_value)
        return self.out_proj(out.reshape(*x.shape[:2], -1)), state

    def _expanded(
        self,
        q: Float[Array, "B T H K"],
        q_rope: Float[Array, "B T H P"],
        c: Float[Array, "B T R"],
        r: Float[Array, "B T 1 P"],
        segment_ids: SegmentIds | None,
    ) -> Float[Array, "B T H V"]:
        """Keys and values of every head: fewer products where all tokens are there."""
        kv = self.kv_up(c).reshape(*c.shape[:2], self.heads, -1)
        k = jnp.concatenate([kv[..., : self.key_dim], jnp.broadcast_to(r, q_rope.shape)], axis=-1)
        return attention(
            jnp.concatenate([q, q_rope], axis=-1),
            k,
            kv[..., self.key_dim :],
            scale=self.scale,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def _up(self) -> tuple[Float[Array, "R H K"], Float[Array, "R H V"]]:
        kernel = self.kv_up.kernel[...].astype(self.dtype).reshape(self.latent_dim, self.heads, -1)
        return kernel[..., : self.key_dim], kernel[..., self.key_dim :]

    def _turned(self, x: Float[Array, "B T H P"], positions: Positions) -> Float[Array, "B T H P"]:
        if self.rope_theta is None:
            return x
        return rope(x, positions, theta=self.rope_theta, scaling=self.rope_scaling, interleaved=self.rope_interleaved)
