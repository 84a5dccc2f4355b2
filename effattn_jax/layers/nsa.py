"""Native sparse attention, NSA (Yuan et al. 2025, arXiv:2502.11089)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax.layers.projection import LECUN, Projection
from effattn_jax.layers.routed import Arrays, RoutedAttention
from effattn_jax.precision import accumulation_dtype
from effattn_jax.sparse.nsa import KV, nsa, nsa_compress
from effattn_jax.sparse.nsa_cache import NSACache, append_nsa, cached_nsa, init_nsa_cache
from effattn_jax.typing import Array, Float, Hidden, Positions


class NSA(RoutedAttention):
    """Three branches, each with keys and values of its own, weighed by g = sigmoid(W_g x), three numbers per head:

    windows of kernel_size tokens, compressed to one by phi; topk blocks, which the heads of a group share and the
    weights of the first branch choose; the last `window` tokens. phi is W_2 silu(W_1 [x_1 + p_1, ..., x_l + p_l]), one
    for keys and one for values, with learned places p. Every branch's keys are rotated, compressed ones by the position
    of their first token after phi (the paper leaves this open; so a document is alike wherever it begins).

    Args:
      dim: D.
      heads, kv_heads, head_dim, qk_norm, rope_theta: as of `Attention`.
      kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, window: as of `effattn_jax.sparse.nsa`.
      mean: phi is the mean of the window, without parameters.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int = 32,
        kernel_stride: int = 16,
        block_size: int = 64,
        topk: int = 16,
        init_blocks: int = 1,
        local_blocks: int = 2,
        window: int = 512,
        mean: bool = False,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        super().__init__(dim, rngs=rngs, **attention)
        self.options: dict[str, Any] = {
            "kernel_size": kernel_size,
            "kernel_stride": kernel_stride,
            "block_size": block_size,
            "topk": topk,
            "init_blocks": init_blocks,
            "local_blocks": local_blocks,
            "window": window,
        }
        inner = self.kv_heads * self.head_dim
        into: dict[str, Any] = {"axes": ("embed", "heads"), "dtype": self.dtype, "rngs": rngs}
        self.compressed_k_proj, self.compressed_v_proj, self.near_k_proj, self.near_v_proj = (
            Projection(dim, inner, **into) for _ in range(4)
        )
        self.gate_proj = Projection(dim, 3 * self.heads, **into)
        sizes = (kernel_size, self.head_dim)
        self.phi_k = None if mean else Compression(*sizes, dtype=self.dtype, rngs=rngs)
        self.phi_v = None if mean else Compression(*sizes, dtype=self.dtype, rngs=rngs)

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections, on average over a causal row."""
        mean = (length + 1) / 2
        blocks = min(mean, self.options["topk"] * self.options["block_size"])
        keys = mean / self.options["kernel_stride"] + blocks + min(mean, self.options["window"])
        return 4 * self.heads * self.head_dim * keys

    def remember(self, x: Hidden, positions: Positions) -> tuple[Array, ...]:
        return (
            self.normed_key(self.compressed_k_proj(x)),
            self.by_head(self.compressed_v_proj(x)),
            *super().remember(x, positions),
            self.rotated(self.normed_key(self.near_k_proj(x)), positions),
            self.by_head(self.near_v_proj(x)),
            jnp.broadcast_to(positions, x.shape[:2]).astype(jnp.int32),
        )

    def ask(self, x: Hidden, positions: Positions) -> tuple[Array, ...]:
        gates = jax.nn.sigmoid(self.gate_proj(x).astype(jnp.float32))
        return *super().ask(x, positions), gates.reshape(*x.shape[:2], self.heads, 3)

    def read(self, asked: Arrays, remembered: Arrays, segment_ids: Array | None, cache: Any = None) -> Array:
        (q, gates), (*arrays, positions) = asked, remembered
        raw, selected, near = _branches(arrays)
        compressed = nsa_compress(*raw, segment_ids=segment_ids, **self._phi())
        start = jnp.broadcast_to(compressed.windows.start, (q.shape[0], compressed.k.shape[1]))
        begins = jnp.take_along_axis(positions, jnp.minimum(start, positions.shape[1] - 1), axis=1)
        return nsa(
            q,
            compressed._replace(k=self.rotated(compressed.k, begins)),
            selected,
            near,
            gates,
            segment_ids=segment_ids,
            implementation=self.implementation,
            **self.options,
        )

    def _phi(self) -> dict[str, Any]:
        windows = {name: self.options[name] for name in ("kernel_size", "kernel_stride")}
        return {"phi_k": self.phi_k, "phi_v": self.phi_v, **windows}

    def init_cache(self, batch_size: int, capacity: int) -> NSACache:
        return init_nsa_cache(
            batch_size,
            capacity,
            self.kv_heads,
            self.head_dim,
            kernel_size=self.options["kernel_size"],
            kernel_stride=self.options["kernel_stride"],
            window=self.options["window"],
            dtype=self.dtype,
            compressed_dtype=accumulation_dtype(self.dtype) if self.phi_k is None else self.dtype,
        )

    def append(self, remembered: Arrays, cache: NSACache, new: Array | None) -> NSACache:
        *arrays, positions = remembered
        return append_nsa(*_branches(arrays), cache, positions=positions, rotate=self.rotated, new=new, **self._phi())

    def step(self, asked: Arrays, remembered: Arrays, cache: NSACache, new: Array | None) -> tuple[Array, NSACache]:
        (q, gates), (*arrays, positions) = asked, remembered
        return cached_nsa(
            q,
            *_branches(arrays),
            gates,
            cache,
            positions=positions,
            rotate=self.rotated,
            new=new,
            implementation=self.implementation,
            **self.options | self._phi(),
        )


def _branches(arrays: Sequence[Array]) -> tuple[KV, KV, KV]:
    return KV(*arrays[:2]), KV(*arrays[2:4]), KV(*arrays[4:])


class Compression(nnx.Module):
    """W_2 silu(W_1 [x_1 + p_1, ..., x_l + p_l]): l tokens of K channels to one, the same for every head."""

    def __init__(self, kernel_size: int, head_dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.place = nnx.Param(jnp.zeros((kernel_size, head_dim), jnp.float32), axes=("conv", "state"))
        shape = (kernel_size * head_dim, head_dim)
        self.into = nnx.Param(LECUN(rngs.params(), shape, jnp.float32), axes=("conv", "state"))
        self.out = nnx.Param(LECUN(rngs.params(), (head_dim, head_dim), jnp.float32), axes=("state", "state"))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B W l G K"]) -> Float[Array, "B W G K"]:
        x = x.astype(self.dtype) + self.place[...].astype(self.dtype)[:, None]
        x = jnp.moveaxis(x, 3, 2)
        hidden = jax.nn.silu(x.reshape(*x.shape[:3], -1) @ self.into[...].astype(self.dtype))
        return hidden @ self.out[...].astype(self.dtype)
