"""PaTH attention: data-dependent positions from products of Householder-like steps (arXiv:2505.16381)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.l2_norm import l2_norm
from effattn_jax.layers.low_rank import LowRank
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.layers.short_convolution import ShortConvolution
from effattn_jax.sparse import PathCache, cached_path_attention, init_path_cache, path_attention
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds


class PathState(NamedTuple):
    """Keys carried on by every step, and the inputs that the convolution of w still needs."""

    cache: PathCache
    w_tail: Float[Array, "B W-1 GK"]
    document: Int[Array, " B"]


class PathAttention(nnx.Module):
    """o_i = sum_j softmax_j(q_i^T H_i ... H_{j+1} k_j / sqrt(K)) v_j,  H_t = I - beta_t w_t w_t^T

    with w = unit(silu(conv(W_up W_down x))), of one direction per key head, and beta = 2 sigmoid(W_beta x + b) in
    (0, 2). There are no other positions. `forget_gate` adds those of FoX (Lin et al. 2025, arXiv:2503.02130) to the
    scores, `qk_norm` an RMSNorm over each head of q and k; `rank` of the projection to w, None for a full one.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        kv_heads: int | None = None,
        rank: int | None = 32,
        conv_width: int = 3,
        forget_gate: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        heads = max(1, dim // 64) if heads is None else heads
        if heads < 1 or dim % heads:
            checks.fail("heads", heads, f"a divisor of dim = {dim}")
        kv_heads = heads if kv_heads is None else kv_heads
        checks.check_head_groups("kv_heads", kv_heads, "the queries", heads)
        self.heads, self.kv_heads, self.head_dim, self.dtype = heads, kv_heads, dim // heads, dtype
        kv_dim = kv_heads * self.head_dim

        self.q_proj = Projection(dim, dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k_proj = Projection(dim, kv_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v_proj = Projection(dim, kv_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.w_proj: Any = (
            Projection(dim, kv_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
            if rank is None
            else LowRank(dim, rank, kv_dim, dtype=dtype, rngs=rngs)
        )
        self.w_conv = ShortConvolution(kv_dim, conv_width, bias=False, axis="heads", dtype=dtype, rngs=rngs)
        self.beta_proj = Projection(dim, kv_heads, ("embed", "heads"), bias=True, dtype=dtype, rngs=rngs)
        self.forget_proj = (
            Projection(dim, heads, ("embed", "heads"), bias=True, dtype=dtype, rngs=rngs) if forget_gate else None
        )
        self.q_norm = RMSNorm(self.head_dim, eps=norm_eps, axis="head", dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=norm_eps, axis="head", dtype=dtype) if qk_norm else None
        self.out_proj = Projection(dim, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> PathState:
        """A cache of `max_length` tokens."""
        return PathState(
            init_path_cache(batch_size, max_length, self.heads, self.head_dim, self.head_dim),
            self.w_conv.init_state(batch_size),
            no_document(batch_size),
        )

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections, on average over a causal row: scores, values
        and the step that every key takes."""
        return 6 * self.heads * self.head_dim * (length + 1) / 2

    def __call__(
        self,
        x: Hidden,
        state: PathState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, PathState | None]:
        """`positions` is of no consequence here: the steps are the positions."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        batch, length, _ = x.shape
        tail = None
        if state is not None:
            tail = forget_other_documents(_Tail(state.w_tail, state.document), segment_ids).w_tail
        by_head = lambda y, heads: y.reshape(batch, length, heads, self.head_dim)  # noqa: E731
        q, k = by_head(self.q_proj(x), self.heads), by_head(self.k_proj(x), self.kv_heads)
        v = by_head(self.v_proj(x), self.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        w, tail = self.w_conv(self.w_proj(x), tail, segment_ids=segment_ids)
        w = l2_norm(by_head(w, self.kv_heads).astype(jnp.float32))
        beta = 2 * jax.nn.sigmoid(self.beta_proj(x).astype(jnp.float32))
        forget = None
        if self.forget_proj is not None:
            forget = jax.nn.log_sigmoid(self.forget_proj(x).astype(jnp.float32))
        if state is None or tail is None:
            out, new_state = path_attention(q, k, v, w, beta, log_forget=forget, segment_ids=segment_ids), None
        else:
            document = new_document(state.document, segment_ids)
            ids = jnp.broadcast_to(document[:, None], (batch, length)) if segment_ids is None else segment_ids
            out, cache = cached_path_attention(q, k, v, w, beta, state.cache, ids, log_forget=forget)
            new_state = PathState(cache, tail, document)
        return self.out_proj(out.reshape(batch, length, self.heads * self.head_dim)), new_state


class _Tail(NamedTuple):
    w_tail: Array
    document: Array
