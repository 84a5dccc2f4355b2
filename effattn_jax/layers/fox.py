"""Forgetting attention: the Forgetting Transformer, FoX (Lin et al. 2025, arXiv:2503.02130)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.layers.token_shift import init_shift, token_shift
from effattn_jax.sparse import (
    ForgettingCache,
    cached_forgetting_attention,
    forgetting_attention,
    init_forgetting_cache,
)
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds


class ShiftState(NamedTuple):
    """The last keys and values before the shift."""

    k: Float[Array, "B 1 GK"]
    v: Float[Array, "B 1 GK"]
    document: Int[Array, " B"]


class ForgettingState(NamedTuple):
    cache: ForgettingCache
    shift: ShiftState


class ForgettingAttention(nnx.Module):
    """f = log sigmoid(W_f x + b), a gate per query head, and F its sum over the tokens so far;

        o_i = sum_{j <= i} softmax_j(q_i . k_j / sqrt(K) + F_i - F_j) v_j
        output = W_out o

    without other positions. All four options together are the Pro block.

    Args:
      dim: D.
      heads: H; None means D / 64.
      kv_heads: G heads of keys and values, each shared by consecutive query heads; None means H.
      head_dim: K; None means D / H.
      kv_shift: k_t <- a k_{t-1} + (1 - a) k_t with a = sigmoid(W x_t) per head, and v alike.
      qk_norm: RMSNorm over each head of q and (shifted) k.
      output_norm: RMSNorm over each head of o.
      output_gate: sigmoid(W_gate x) * o, after the norm.
      bias: of the projections of q, k and v.
      norm_eps: eps of the norms.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        kv_shift: bool = False,
        qk_norm: bool = False,
        output_norm: bool = False,
        output_gate: bool = False,
        bias: bool = False,
        norm_eps: float = 1e-6,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        heads = max(1, dim // 64) if heads is None else heads
        if heads < 1 or (head_dim is None and dim % heads):
            checks.fail("heads", heads, f"a divisor of dim = {dim}, or head_dim")
        kv_heads = heads if kv_heads is None else kv_heads
        checks.check_head_groups("kv_heads", kv_heads, "the queries", heads)
        head_dim = dim // heads if head_dim is None else head_dim
        self.heads, self.kv_heads, self.head_dim, self.dtype = heads, kv_heads, head_dim, dtype
        inner, kv_dim = heads * head_dim, kv_heads * head_dim

        into: dict[str, Any] = {"axes": ("embed", "heads"), "dtype": dtype, "rngs": rngs}
        self.q_proj = Projection(dim, inner, bias=bias, **into)
        self.k_proj = Projection(dim, kv_dim, bias=bias, **into)
        self.v_proj = Projection(dim, kv_dim, bias=bias, **into)
        self.forget_proj = Projection(dim, heads, bias=True, **into)
        self.k_shift_proj = Projection(dim, kv_heads, **into) if kv_shift else None
        self.v_shift_proj = Projection(dim, kv_heads, **into) if kv_shift else None
        norm: dict[str, Any] = {"eps": norm_eps, "axis": "heads", "dtype": dtype}
        self.q_norm = RMSNorm(inner, groups=heads, **norm) if qk_norm else None
        self.k_norm = RMSNorm(kv_dim, groups=kv_heads, **norm) if qk_norm else None
        self.norm = RMSNorm(inner, groups=heads, **norm) if output_norm else None
        self.gate_proj = Projection(dim, inner, **into) if output_gate else None
        self.out_proj = Projection(inner, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> ForgettingState:
        """A cache of `max_length` tokens."""
        sizes = (batch_size, max_length, self.heads, self.kv_heads, self.head_dim)
        tail = init_shift(batch_size, self.kv_heads * self.head_dim, self.dtype)
        return ForgettingState(
            init_forgetting_cache(*sizes, dtype=self.dtype), ShiftState(tail, tail, no_document(batch_size))
        )

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections, on average over a causal row."""
        return 4 * self.heads * self.head_dim * (length + 1) / 2

    def __call__(
        self,
        x: Hidden,
        state: ForgettingState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, ForgettingState | None]:
        """`positions` is of no consequence here: the gates know the order."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        shift = None if state is None else forget_other_documents(state.shift, segment_ids)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.k_shift_proj is not None and self.v_shift_proj is not None:
            k, k_tail = self._shifted(k, self.k_shift_proj(x), None if shift is None else shift.k, segment_ids)
            v, v_tail = self._shifted(v, self.v_shift_proj(x), None if shift is None else shift.v, segment_ids)
            if shift is not None and k_tail is not None and v_tail is not None:
                shift = shift._replace(k=k_tail, v=v_tail)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.reshape(*x.shape[:2], self.heads, self.head_dim)
        k, v = (y.reshape(*x.shape[:2], self.kv_heads, self.head_dim) for y in (k, v))
        log_forget = jax.nn.log_sigmoid(self.forget_proj(x).astype(jnp.float32))
        if state is None or shift is None:
            o, new_state = forgetting_attention(q, k, v, log_forget, segment_ids=segment_ids), None
        else:
            o, cache = cached_forgetting_attention(q, k, v, log_forget, state.cache, segment_ids=segment_ids)
            document = new_document(shift.document, segment_ids)
            new_state = ForgettingState(cache, shift._replace(document=document))
        o = o.reshape(*x.shape[:2], self.heads * self.head_dim)
        if self.norm is not None:
            o = self.norm(o)
        if self.gate_proj is not None:
            o = jax.nn.sigmoid(self.gate_proj(x).astype(jnp.float32)).astype(self.dtype) * o
        return self.out_proj(o), new_state

    def _shifted(
        self, y: Hidden, gate: Float[Array, "B T G"], tail: Array | None, segment_ids: SegmentIds | None
    ) -> tuple[Hidden, Array | None]:
        """a y_{t-1} + (1 - a) y_t, and the last y."""
        before, tail = token_shift(y, tail, segment_ids)
        a = jax.nn.sigmoid(gate.astype(jnp.float32)).astype(self.dtype)
        a = jnp.repeat(a, self.head_dim, axis=-1)
        return a * before + (1 - a) * y, tail
