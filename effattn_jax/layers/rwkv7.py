"""RWKV-7: a memory with a gate per channel that replaces under one key and writes under another (Peng et al. 2025,
arXiv:2503.14456)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.first_value import FirstValue, first_or_own
from effattn_jax.layers.layer_norm import LayerNorm
from effattn_jax.layers.low_rank import LowRank
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rwkv7_start import start_time_mix
from effattn_jax.layers.token_shift import init_shift, token_shift
from effattn_jax.linear import dplr
from effattn_jax.typing import Array, Float, Hidden, Int, MatrixState, Positions, SegmentIds


class RWKV7State(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: MatrixState  # [B, H, N, N], keys by values
    shift: Float[Array, "B 1 D"]
    document: Int[Array, " B"]


class RWKV7(nnx.Module):
    """The time mix. With x_c = x_t + (x_{t-1} - x_t) * mu_c for each of c = r, w, k, v, a, g:

        r = W_r x_r,   k = W_k x_k,   v = W_v x_v,   gate = sigmoid(x_g G) G'
        log w = -e^{-1/2} sigmoid(w_0 + tanh(x_w W) W'),   a = sigmoid(a_0 + x_a A A')
        v <- v + (v_first - v) * sigmoid(v_0 + x_v V V')
        kappa = k * k_k to length one,   k <- k * (1 + (a - 1) * k_a)

    and for every head, of N channels of each,

        S_t = diag(w_t) S_{t-1} - (kappa_t * a_t) (S_{t-1}^T kappa_t)^T + k_t v_t^T
        y_t = LayerNorm(S_t^T r_t) + (sum_n r k r_k) v_t,   output = W_o (y * gate)

    which is `dplr` with a = -kappa, b = kappa * a and scale 1. v_first is the v of the first layer at the same token
    (`with_first_value`); in the first layer it is v itself, and v_0, V, V' are without effect. Weights start as the
    authors' do, by the place of the layer in the stack.

    Args:
      head_dim: N; there are dim / N heads.
      decay_rank, rate_rank, value_rank, gate_rank: channels that w, a, the mixing of v and the gate go through. None
        means the multiple of 32 nearest to 2.5, 2.5, 1.7 and 5 times sqrt(dim), at least 32; released models differ.
      norm_eps: of the LayerNorm; 64e-5 whatever N is (flash-linear-attention: N * 1e-5).
      layer_index, layer_count: the place in the stack.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        norm_eps: float = 64e-5,
        layer_index: int | Array = 0,
        layer_count: int = 1,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        if head_dim < 2 or dim % head_dim:
            checks.fail("head_dim", head_dim, f"a divisor of dim = {dim}, at least 2")
        heads = dim // head_dim
        self.heads, self.head_dim, self.value_dim = heads, head_dim, dim
        self.dtype, self.implementation = dtype, implementation

        channels = lambda: nnx.Param(jnp.zeros((dim,), jnp.float32), axes=("heads",))  # noqa: E731
        mixing = lambda: nnx.Param(jnp.zeros((dim,), jnp.float32), axes=("embed",))  # noqa: E731
        project = lambda: Projection(dim, dim, ("embed", "heads"), dtype=dtype, rngs=rngs)  # noqa: E731
        low_rank = lambda rank, factor, **options: LowRank(  # noqa: E731
            dim, rank or _default_rank(dim, factor), dim, **options, dtype=dtype, rngs=rngs
        )
        self.mu_r, self.mu_w, self.mu_k, self.mu_v, self.mu_a, self.mu_g = (mixing() for _ in range(6))
        self.r_proj, self.k_proj, self.v_proj = project(), project(), project()
        self.w_proj = low_rank(decay_rank, 2.5, activation=jnp.tanh, bias=True)
        self.a_proj = low_rank(rate_rank, 2.5, bias=True)
        self.v_mix = low_rank(value_rank, 1.7, bias=True)
        self.g_proj = low_rank(gate_rank, 5, activation=jax.nn.sigmoid)
        self.k_k, self.k_a = channels(), channels()
        self.r_k = nnx.Param(jnp.zeros((heads, head_dim), jnp.float32), axes=("heads", "head"))
        self.norm = LayerNorm(dim, groups=heads, eps=norm_eps, axis="heads", dtype=jnp.float32)
        self.out_proj = Projection(dim, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)
        start_time_mix(self, layer_index, layer_count, rngs)

    def init_state(self, batch_size: int, max_length: int) -> RWKV7State:
        """`max_length` is of no consequence here: the state has one size."""
        return RWKV7State(
            memory=jnp.zeros((batch_size, self.heads, self.head_dim, self.head_dim), jnp.float32),
            shift=init_shift(batch_size, self.value_dim, self.dtype),
            document=no_document(batch_size),
        )

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: two reads and two writes."""
        return 8 * self.heads * self.head_dim * self.head_dim

    def __call__(
        self,
        x: Hidden,
        state: RWKV7State | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, RWKV7State | None]:
        """The first layer of a stack. `positions` is of no consequence here: the recurrence knows the order."""
        y, state, _ = self.with_first_value(x, state, None, segment_ids=segment_ids, positions=positions)
        return y, state

    def with_first_value(
        self,
        x: Hidden,
        state: RWKV7State | None,
        first: FirstValue | None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, RWKV7State | None, FirstValue]:
        """A layer of a stack: `first` are the values of the first one, its own where they are not known yet."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        memory, shift = (None, None) if state is None else state[:2]

        x = x.astype(self.dtype)
        before, shift = token_shift(x, shift, segment_ids)
        mixed = lambda mu: x + (before - x) * mu[...].astype(self.dtype)  # noqa: E731
        float32 = lambda y: y.astype(jnp.float32)  # noqa: E731
        by_heads = lambda y: y.reshape(*x.shape[:2], self.heads, self.head_dim)  # noqa: E731

        r, k, v = self.r_proj(mixed(self.mu_r)), self.k_proj(mixed(self.mu_k)), self.v_proj(mixed(self.mu_v))
        log_w = -math.exp(-0.5) * jax.nn.sigmoid(float32(self.w_proj(mixed(self.mu_w))))
        a = jax.nn.sigmoid(float32(self.a_proj(mixed(self.mu_a))))
        first = first_or_own(first, v)
        v = v + (first.value - v) * jax.nn.sigmoid(self.v_mix(mixed(self.mu_v)))
        kappa = _unit(by_heads(float32(k) * self.k_k[...]))
        k = (k * (1 + (a - 1) * self.k_a[...])).astype(self.dtype)

        r, k, v = by_heads(r), by_heads(k), by_heads(v)
        y, memory = dplr(
            r,
            k,
            v,
            -kappa.astype(self.dtype),
            (kappa * by_heads(a)).astype(self.dtype),
            by_heads(log_w),
            scale=1.0,
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        bonus = jnp.sum(float32(r) * k * self.r_k[...], axis=-1, keepdims=True) * v
        y = self.norm(y.reshape(x.shape)) + bonus.reshape(x.shape)
        y = self.out_proj(y * self.g_proj(mixed(self.mu_g)))
        if state is None or shift is None:
            return y, None, first
        return y, RWKV7State(memory, shift, new_document(state.document, segment_ids)), first


def _default_rank(dim: int, factor: float) -> int:
    return max(32, 32 * round(factor * dim**0.5 / 32))


def _unit(x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """x / max(|x|, 1e-12)."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
