"""Lightning attention: linear attention with a constant decay per head (Qin et al. 2024, arXiv:2401.04658), as in
MiniMax-01 (MiniMax 2025, arXiv:2501.08313)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.buffer import Buffer, constant
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.positions import document_positions
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.layers.rope import rope
from effattn_jax.linear import scalar_decay
from effattn_jax.typing import Array, Hidden, Int, MatrixState, Positions, SegmentIds


def alibi_slopes(heads: int) -> list[float]:
    """2^{-8h/H}, h = 1 .. H, where H is a power of two; else those of the power P below, then every other one of 2P
    (ALiBi; Press et al. 2022, arXiv:2108.12409)."""
    power = 2 ** int(math.log2(heads))
    own = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    return own if power == heads else own + alibi_slopes(2 * power)[0::2][: heads - power]


class LightningState(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: MatrixState
    position: Int[Array, " B"]  # of the next token in its document
    document: Int[Array, " B"]


class LightningAttention(nnx.Module):
    """q, k, v = silu(projection of the input); for every head h of layer l of L

        S_t = e^{-s_h} S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t
        s_h = slope_h (1 - l / (L - 1) + 1e-5)
        output = W_out (sigmoid(W_gate x) * RMSNorm(o))

    with the norm over all heads together. The last layers hardly forget. The slopes are those of ALiBi, the largest
    in the first head.

    Args:
      dim: D.
      heads: H.
      head_dim: K = V of a head; None means D / H.
      layer_slopes: the factor of the layer; without it s_h = slope_h.
      rope_theta: turn q and k by their positions (MiniCPM-SALA); None does not (MiniMax-01).
      norm_eps: eps of the norm.
      layer_index, layer_count: l and L.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        layer_slopes: bool = True,
        rope_theta: float | None = None,
        norm_eps: float = 1e-5,
        layer_index: int | Array = 0,
        layer_count: int = 1,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or (head_dim is None and dim % heads):
            checks.fail("heads", heads, f"a divisor of dim = {dim}, or head_dim")
        head_dim = dim // heads if head_dim is None else head_dim
        if rope_theta is not None and head_dim % 2:
            checks.fail("head_dim", head_dim, "an even number of channels to turn")
        self.heads, self.head_dim, self.rope_theta = heads, head_dim, rope_theta
        self.dtype, self.implementation = dtype, implementation

        inner = heads * head_dim
        self.qkv_proj = Projection(dim, 3 * inner, ("embed", "heads"), dtype=dtype, rngs=rngs)  # q, k, v of each head
        self.gate_proj = Projection(dim, inner, ("embed", "heads"), dtype=dtype, rngs=rngs)
        factor = 1 - layer_index / (layer_count - 1 + 1e-5) + 1e-5 if layer_slopes else 1
        self.slopes = Buffer(jnp.array(alibi_slopes(heads), jnp.float32) * factor, axes=("heads",))
        self.norm = RMSNorm(inner, eps=norm_eps, axis="heads", dtype=dtype)
        self.out_proj = Projection(inner, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> LightningState:
        """`max_length` is of no consequence here: the state has one size."""
        return LightningState(
            memory=jnp.zeros((batch_size, self.heads, self.head_dim, self.head_dim), jnp.float32),
            position=jnp.zeros((batch_size,), jnp.int32),
            document=no_document(batch_size),
        )

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: the recurrence, one write and one read."""
        return 4 * self.heads * self.head_dim**2

    def __call__(
        self,
        x: Hidden,
        state: LightningState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, LightningState | None]:
        """`positions` [B, T] turn queries and keys, with `rope_theta`; None counts from the start of each document."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        memory, start = (None, None) if state is None else state[:2]
        positions, following = document_positions(x.shape[:2], start, segment_ids, positions)

        qkv = jax.nn.silu(self.qkv_proj(x)).reshape(*x.shape[:2], self.heads, 3 * self.head_dim)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        if self.rope_theta is not None:
            q, k = (rope(part, positions, theta=self.rope_theta) for part in (q, k))
        o, memory = scalar_decay(
            q,
            k,
            v,
            -constant(self.slopes),
            scale=1.0,
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        gate = jax.nn.sigmoid(self.gate_proj(x).astype(jnp.float32))
        y = self.out_proj(gate * self.norm(o.reshape(gate.shape)))
        if state is None:
            return y, None
        return y, LightningState(memory, following, new_document(state.document, segment_ids))
