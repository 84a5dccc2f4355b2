"""Gated slot attention: a softmax over a fixed number of slots that forget (Zhang et al. 2024, arXiv:2409.07146)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.expansion import head_dim
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.linear import SlotState, gated_slot_attention
from effattn_jax.linear.arguments import repeat_heads
from effattn_jax.typing import Array, Hidden, Int, Positions, SegmentIds


class GSAState(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: SlotState  # keys [B, H, M, K], values [B, H, M, V]
    document: Int[Array, " B"]


class GatedSlotAttention(nnx.Module):
    """q, k, v = silu of projections of the input; for every head h, with M slots,

        g_t = log sigmoid(W_f x_t) / tau, a number per slot;   s_t = 1 - e^{g_t}
        K_t = diag(e^{g_t}) K_{t-1} + s_t k_t^T,   V_t = diag(e^{g_t}) V_{t-1} + s_t v_t^T
        o_t = V_t^T softmax(K_t q_t)
        output = W_o RMSNorm(silu(o))

    which is `effattn_jax.linear.gated_slot_attention` with scale 1. The norm runs over all channels.

    Args:
      heads: of queries and of the memory.
      kv_heads: of keys, values and gates, each serving heads / kv_heads consecutive ones; None means `heads`.
      expand_k, expand_v: channels of all heads of queries and of values, as multiples of dim.
      slots: M.
      gate_temperature: tau; the larger, the slower the memory forgets at first.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        kv_heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        slots: int = 64,
        gate_temperature: float = 8.0,
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
        if slots < 1:
            checks.fail("slots", slots, "at least 1")
        if gate_temperature <= 0:
            checks.fail("gate_temperature", gate_temperature, "a number above 0")
        self.heads, self.kv_heads, self.slots = heads, kv_heads, slots
        self.gate_temperature = gate_temperature
        self.dtype, self.implementation = dtype, implementation

        project = lambda size: Projection(dim, size, ("embed", "heads"), dtype=dtype, rngs=rngs)  # noqa: E731
        self.q_proj, self.k_proj = project(heads * self.key_dim), project(kv_heads * self.key_dim)
        self.v_proj, self.f_proj = project(kv_heads * self.value_dim), project(kv_heads * slots)
        values = heads * self.value_dim
        self.norm = RMSNorm(values, eps=norm_eps, axis="heads", dtype=dtype)
        self.out_proj = Projection(values, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> GSAState:
        """`max_length` is of no consequence here: the state has one size."""
        empty = lambda size: jnp.zeros((batch_size, self.heads, self.slots, size), jnp.float32)  # noqa: E731
        return GSAState(SlotState(empty(self.key_dim), empty(self.value_dim)), no_document(batch_size))

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: one write and one read of each memory."""
        return 4 * self.heads * self.slots * (self.key_dim + self.value_dim)

    def __call__(
        self,
        x: Hidden,
        state: GSAState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, GSAState | None]:
        """`positions` is of no consequence here: the recurrence knows the order."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        by_heads = lambda y, heads, size: y.reshape(*x.shape[:2], heads, size)  # noqa: E731
        log_decay = jax.nn.log_sigmoid(self.f_proj(x).astype(jnp.float32)) / self.gate_temperature
        log_decay = repeat_heads(by_heads(log_decay, self.kv_heads, self.slots), self.heads)
        o, memory = gated_slot_attention(
            by_heads(jax.nn.silu(self.q_proj(x)), self.heads, self.key_dim),
            by_heads(jax.nn.silu(self.k_proj(x)), self.kv_heads, self.key_dim),
            by_heads(jax.nn.silu(self.v_proj(x)), self.kv_heads, self.value_dim),
            -jnp.expm1(log_decay),
            log_decay,
            scale=1.0,
            initial_state=None if state is None else state.memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = self.out_proj(self.norm(jax.nn.silu(o).reshape(*x.shape[:2], self.heads * self.value_dim)))
        if state is None:
            return y, None
        return y, GSAState(memory, new_document(state.document, segment_ids))
