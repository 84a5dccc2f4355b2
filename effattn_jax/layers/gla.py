"""Gated linear attention: a memory with a gate per channel of the keys (Yang et al. 2023, arXiv:2312.06635)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.expansion import head_dim
from effattn_jax.layers.low_rank import LowRank
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.layers.short_convolution import ShortConvolution
from effattn_jax.layers.short_qkv import QKVTails
from effattn_jax.linear import vector_decay
from effattn_jax.linear.arguments import repeat_heads
from effattn_jax.typing import Array, Hidden, Int, MatrixState, Positions, SegmentIds


class GLAState(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: MatrixState
    tails: QKVTails | None  # of the convolutions, where there are any
    document: Int[Array, " B"]


class GatedLinearAttention(nnx.Module):
    """q, k, v = projections of the input; for every head h

        g_t = log sigmoid(W_2 W_1 x_t + b) / tau, a number per channel of the keys
        S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T,   o_t = K^{-1/2} S_t^T q_t
        output = W_o (RMSNorm(o) * silu(W_g x))

    which is `vector_decay`. The norm runs over each head, with one scale for all heads.

    Args:
      heads: of queries and of the memory.
      kv_heads: of keys, gates and values, each serving heads / kv_heads consecutive ones; None means `heads`.
      expand_k, expand_v: channels of all heads of queries and of values, as multiples of dim.
      conv_width: a convolution over so many tokens and silu on each of q, k and v; None means none.
      gate_rank: channels between W_1 and W_2.
      gate_temperature: tau; the larger, the slower the memory forgets at first.
      gate_floor: g stays above it, if given.
      output_gate: without it the output is W_o RMSNorm(o).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        kv_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        conv_width: int | None = None,
        gate_rank: int = 16,
        gate_temperature: float = 16.0,
        gate_floor: float | None = None,
        output_gate: bool = True,
        norm_eps: float = 1e-5,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1:
            checks.fail("heads", heads, "at least 1")
        checks.check_head_groups("kv_heads", kv_heads, "the queries", heads)
        self.key_dim = head_dim("expand_k", expand_k, dim, heads)
        self.value_dim = head_dim("expand_v", expand_v, dim, heads)
        if gate_temperature <= 0:
            checks.fail("gate_temperature", gate_temperature, "a number above 0")
        if gate_floor is not None and gate_floor >= 0:
            checks.fail("gate_floor", gate_floor, "None or a number below 0")
        self.heads, self.kv_heads = heads, kv_heads
        self.gate_temperature, self.gate_floor = gate_temperature, gate_floor
        self.dtype, self.implementation = dtype, implementation

        queries, keys, values = heads * self.key_dim, kv_heads * self.key_dim, kv_heads * self.value_dim
        project = lambda size: Projection(dim, size, ("embed", "heads"), dtype=dtype, rngs=rngs)  # noqa: E731
        convolve = lambda size: (  # noqa: E731
            None if conv_width is None else ShortConvolution(size, conv_width, bias=False, dtype=dtype, rngs=rngs)
        )
        self.q_proj, self.k_proj, self.v_proj = project(queries), project(keys), project(values)
        self.q_conv, self.k_conv, self.v_conv = convolve(queries), convolve(keys), convolve(values)
        self.decay_proj = LowRank(dim, gate_rank, keys, bias=True, dtype=dtype, rngs=rngs)
        self.gate_proj = project(heads * self.value_dim) if output_gate else None
        self.norm = RMSNorm(self.value_dim, eps=norm_eps, axis="head", dtype=jnp.float32)
        self.out_proj = Projection(heads * self.value_dim, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> GLAState:
        """`max_length` is of no consequence here: the state has one size."""
        tails = None
        if self.q_conv is not None and self.k_conv is not None and self.v_conv is not None:
            tails = QKVTails(*(conv.init_state(batch_size) for conv in (self.q_conv, self.k_conv, self.v_conv)))
        memory = jnp.zeros((batch_size, self.heads, self.key_dim, self.value_dim), jnp.float32)
        return GLAState(memory, tails, no_document(batch_size))

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: the recurrence, one write and one read."""
        return 4 * self.heads * self.key_dim * self.value_dim

    def __call__(
        self,
        x: Hidden,
        state: GLAState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, GLAState | None]:
        """`positions` is of no consequence here: the recurrence knows the order."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        memory, tails = (None, None) if state is None else state[:2]

        q, k, v, tails = self._convolved(self.q_proj(x), self.k_proj(x), self.v_proj(x), tails, segment_ids)
        by_heads = lambda y, heads, size: y.reshape(*x.shape[:2], heads, size)  # noqa: E731
        log_decay = jax.nn.log_sigmoid(self.decay_proj(x).astype(jnp.float32)) / self.gate_temperature
        if self.gate_floor is not None:
            log_decay = jnp.maximum(log_decay, self.gate_floor)
        o, memory = vector_decay(
            by_heads(q, self.heads, self.key_dim),
            by_heads(k, self.kv_heads, self.key_dim),
            by_heads(v, self.kv_heads, self.value_dim),
            repeat_heads(by_heads(log_decay, self.kv_heads, self.key_dim), self.heads),
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = self.norm(o).reshape(*x.shape[:2], self.heads * self.value_dim)
        if self.gate_proj is not None:
            y = y * jax.nn.silu(self.gate_proj(x).astype(jnp.float32))
        y = self.out_proj(y)
        if state is None:
            return y, None
        return y, GLAState(memory, tails, new_document(state.document, segment_ids))

    def _convolved(
        self, q: Hidden, k: Hidden, v: Hidden, tails: QKVTails | None, segment_ids: SegmentIds | None
    ) -> tuple[Hidden, Hidden, Hidden, QKVTails | None]:
        if self.q_conv is None or self.k_conv is None or self.v_conv is None:
            return q, k, v, None
        q_tail, k_tail, v_tail = (None, None, None) if tails is None else tails
        q, q_tail = self.q_conv(q, q_tail, segment_ids=segment_ids)
        k, k_tail = self.k_conv(k, k_tail, segment_ids=segment_ids)
        v, v_tail = self.v_conv(v, v_tail, segment_ids=segment_ids)
        if q_tail is None or k_tail is None or v_tail is None:
            return q, k, v, None
        return q, k, v, QKVTails(q_tail, k_tail, v_tail)
