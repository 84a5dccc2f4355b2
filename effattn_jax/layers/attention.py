"""Softmax attention with grouped key heads, rotary positions, an optional window, learned sinks and query-key norms."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.norms import NORMS
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rope import rope
from effattn_jax.layers.rope_scaling import RopeScaling
from effattn_jax.sparse import KVCache, attention, cached_attention, init_cache
from effattn_jax.typing import Hidden, Positions, SegmentIds


class Attention(nnx.Module):
    """softmax(scale * rope(norm(q)) rope(norm(k))^T + mask) v, with H query heads that share G key/value heads.

    Grouped heads: Ainslie et al. 2023, arXiv:2305.13245. Window: each token sees the last `window` tokens, itself
    included (Mistral, arXiv:2310.06825). Sinks: one learned logit per head in the denominator (gpt-oss). Query-key
    norm: RMSNorm over each head before the rotation (Dehghani et al. 2023, arXiv:2302.05442; Gemma 3).

    Args:
      dim, heads, kv_heads, head_dim: D, H, G (None: H) and K = V (None: D / H).
      qk_norm: True, or the name of a norm of `effattn_jax.layers.norms.NORMS`.
      scale: of the scores; None is K^-1/2.
      rope_theta, rope_fraction, rope_scaling: of the rotation, see `rope`; without theta there is none.
      bias, out_bias: biases of the projections of q, k and v; of the output's.
      gate: the output is multiplied by sigmoid(W_gate x), channel by channel, before its projection (Qwen3-Next).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        sinks: bool = False,
        qk_norm: bool | str = False,
        scale: float | None = None,
        rope_theta: float | None = 10_000.0,
        rope_fraction: float = 1.0,
        rope_scaling: RopeScaling | Mapping[str, Any] | None = None,
        bias: bool = False,
        out_bias: bool = False,
        gate: bool = False,
        logits_soft_cap: float | None = None,
        norm_eps: float = 1e-6,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1:
            checks.fail("heads", heads, "at least 1")
        checks.check_head_groups("kv_heads", kv_heads, "the queries", heads)
        if head_dim is None and dim % heads:
            checks.fail("heads", heads, f"a divisor of dim = {dim}, or head_dim")
        if window is not None and window < 1:
            checks.fail("window", window, "None or at least 1 key")
        head_dim = dim // heads if head_dim is None else head_dim
        rotated = int(head_dim * rope_fraction)
        if rope_theta is not None and (not 2 <= rotated <= head_dim or rotated % 2):
            checks.fail("rope_fraction", f"{rope_fraction} of head_dim {head_dim}", "an even number of channels")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.window, self.rope_theta, self.rope_fraction = window, rope_theta, rope_fraction
        self.scale, self.rope_scaling = scale, RopeScaling.of(rope_scaling)
        self.logits_soft_cap, self.dtype, self.implementation = logits_soft_cap, dtype, implementation
        qk_norm = "rms" if qk_norm is True else qk_norm
        if qk_norm and qk_norm not in NORMS:
            checks.fail("qk_norm", repr(qk_norm), f"True, False or one of {', '.join(sorted(NORMS))}")

        project = lambda size, bias=bias: Projection(  # noqa: E731
            dim, size * head_dim, ("embed", "heads"), bias=bias, dtype=dtype, rngs=rngs
        )
        self.q_proj, self.k_proj, self.v_proj = project(heads), project(kv_heads), project(kv_heads)
        self.gate_proj = project(heads) if gate else None
        self.out_proj = Projection(heads * head_dim, dim, ("heads", "embed"), bias=out_bias, dtype=dtype, rngs=rngs)
        norm = lambda: NORMS[qk_norm](head_dim, eps=norm_eps, axis="head", dtype=dtype) if qk_norm else None  # noqa: E731
        self.q_norm, self.k_norm = norm(), norm()
        self.sinks = nnx.Param(jnp.zeros((heads,), jnp.float32), axes=("heads",)) if sinks else None

    def init_state(self, batch_size: int, max_length: int) -> KVCache:
        """A cache of `max_length` tokens; with a window, a ring of that many."""
        capacity = max_length if self.window is None else self.window
        return init_cache(batch_size, capacity, self.kv_heads, self.head_dim, dtype=self.dtype)

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections, on average over a causal row."""
        keys = (length + 1) / 2 if self.window is None else min(self.window, (length + 1) / 2)
        return 4 * self.heads * self.head_dim * keys

    def __call__(
        self,
        x: Hidden,
        state: KVCache | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, KVCache | None]:
        """`positions` [B, T] turn queries and keys; None counts on from the tokens in the cache."""
        batch, length, _ = x.shape
        q = self.q_proj(x).reshape(batch, length, self.heads, self.head_dim)
        k = self.k_proj(x).reshape(batch, length, self.kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(batch, length, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_theta is not None:
            if positions is None:
                positions = (0 if state is None else state.length) + jnp.arange(length)[None]
            turn: dict[str, Any] = {
                "theta": self.rope_theta,
                "fraction": self.rope_fraction,
                "scaling": self.rope_scaling,
            }
            q, k = rope(q, positions, **turn), rope(k, positions, **turn)
        options: dict[str, Any] = {
            "scale": self.scale,
            "window": self.window,
            "sinks": None if self.sinks is None else self.sinks[...],
            "segment_ids": segment_ids,
            "logits_soft_cap": self.logits_soft_cap,
            "implementation": self.implementation,
        }
        if state is None:
            out, new_state = attention(q, k, v, **options), None
        else:
            out, new_state = cached_attention(q, k, v, state, **options)
        out = out.reshape(batch, length, self.heads * self.head_dim)
        if self.gate_proj is not None:
            out *= jax.nn.sigmoid(self.gate_proj(x))
        return self.out_proj(out), new_state
