"""What layers of the delta rules share: all but the step of the memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.low_rank import LowRank
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.layers.short_qkv import QKVTails, ShortQKV
from effattn_jax.typing import Array, Float, Hidden, Int, MatrixState, Positions, SegmentIds, Values


class DeltaState(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: MatrixState
    tails: QKVTails
    document: Int[Array, " B"]


class DeltaLayer(nnx.Module):
    """q, k, v = silu(conv(W x)); o = recur(q, k, v); output = W_o (RMSNorm(o) * f(g_proj(x))).

    H = `value_heads` heads of the memory; each of the `heads` of queries and keys serves H / heads consecutive ones.
    The norm runs over each head, with one scale for all heads. A mechanism adds `g_proj` for the gate (None: no gate),
    the gates of its memory and the method `recur`.
    """

    gate_activation = staticmethod(jax.nn.silu)
    g_proj: Projection | LowRank | None

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        value_heads: int | None,
        head_dim: int,
        expand_v: float,
        conv_width: int,
        norm_eps: float,
        writes: int = 1,
        qk_activation: Callable[[Array], Array] = jax.nn.silu,
        dtype: Any,
        implementation: Implementation,
        rngs: nnx.Rngs,
    ):
        value_heads = heads if value_heads is None else value_heads
        for name, size in (("heads", heads), ("head_dim", head_dim)):
            if size < 1:
                checks.fail(name, size, "at least 1")
        checks.check_head_groups("heads", heads, "the values", value_heads)
        if expand_v <= 0 or not float(head_dim * expand_v).is_integer():
            checks.fail("expand_v", expand_v, f"a factor that makes head_dim = {head_dim} a whole number of channels")
        self.heads, self.value_heads, self.head_dim = heads, value_heads, head_dim
        self.value_head_dim = int(head_dim * expand_v)
        self.dtype, self.implementation = dtype, implementation
        self.qkv = ShortQKV(
            dim,
            q=(heads, head_dim),
            k=(writes * heads, head_dim),
            v=(writes * value_heads, self.value_head_dim),
            conv_width=conv_width,
            activation=qk_activation,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = RMSNorm(self.value_head_dim, eps=norm_eps, axis="head", dtype=jnp.float32)
        self.out_proj = Projection(self.inner, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    @property
    def inner(self) -> int:
        """Channels of all values."""
        return self.value_heads * self.value_head_dim

    def recur(
        self,
        x: Hidden,
        q: Float[Array, "B T G K"],
        k: Float[Array, "B T G K"],
        v: Values,
        memory: MatrixState | None,
        segment_ids: SegmentIds | None,
    ) -> tuple[Values, MatrixState]:
        """What the memory answers, and the memory after the tokens."""
        raise NotImplementedError

    def init_state(self, batch_size: int, max_length: int) -> DeltaState:
        """`max_length` is of no consequence here: the state has one size."""
        return DeltaState(
            memory=jnp.zeros((batch_size, self.value_heads, self.head_dim, self.value_head_dim), jnp.float32),
            tails=self.qkv.init_state(batch_size),
            document=no_document(batch_size),
        )

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: the recurrence, two reads and one write."""
        return 6 * self.value_heads * self.head_dim * self.value_head_dim

    def __call__(
        self,
        x: Hidden,
        state: DeltaState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, DeltaState | None]:
        """`positions` is of no consequence here: the recurrence knows the order."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        memory, tails = (None, None) if state is None else state[:2]

        q, k, v, tails = self.qkv(x, tails, segment_ids=segment_ids)
        o, memory = self.recur(x, q, k, v, memory, segment_ids)
        y = self.norm(o).reshape(*x.shape[:2], self.inner)
        if self.g_proj is not None:
            y = y * self.gate_activation(self.g_proj(x).astype(jnp.float32))
        y = self.out_proj(y)
        if state is None or tails is None:
            return y, None
        return y, DeltaState(memory, tails, new_document(state.document, segment_ids))
