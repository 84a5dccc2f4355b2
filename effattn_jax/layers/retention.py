"""Multi-scale retention: RetNet (Sun et al. 2023, arXiv:2307.08621)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.positions import document_positions
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.layers.rope import rope
from effattn_jax.linear import scalar_decay
from effattn_jax.typing import Array, Float, Hidden, Int, MatrixState, Positions, SegmentIds

ROTATIONS = ("retnet", "rope", "none")


def retention_decay(heads: int) -> Float[Array, " H"]:
    """log gamma_h with gamma_h = 1 - 2^{-5-h}, h = 0, 1, ..."""
    return jnp.log1p(-(2.0 ** -(5 + jnp.arange(heads, dtype=jnp.float32))))


def pair_rotation(x: Float[Array, "B T H K"], positions: Positions) -> Float[Array, "B T H K"]:
    """Turn the pairs (x_{2m}, x_{2m+1}) by position * 10000^{-m / (K/2 - 1)}: angles from 1 down to 1/10000."""
    theta = 10_000.0 ** -jnp.linspace(0, 1, x.shape[-1] // 2)
    angles = positions.astype(jnp.float32)[:, :, None, None] * theta
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


class RetentionState(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: MatrixState
    position: Int[Array, " B"]  # of the next token in its document
    document: Int[Array, " B"]


class MultiScaleRetention(nnx.Module):
    """q, k, v = projections of the input, q and k turned by their positions, k * K^{-1/2}; for every head h

        S_t = gamma_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t,   gamma_h = 1 - 2^{-5-h}
        output = W_out (silu(W_gate x) * RMSNorm(o))

    with the norm over each head. The rescalings of the authors' parallel form cancel in that norm and are left out.

    Args:
      dim: D.
      heads: H.
      key_dim: K of a head; None means D / H.
      value_dim: V of a head; None means 2 D / H.
      rotation: "retnet" (pairs of neighbours, angles from 1 to 1/10000), "rope" (pairs of halves, `rope`) or "none".
      norm_affine: a scale in the norm, shared by all heads.
      norm_eps: its eps.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        key_dim: int | None = None,
        value_dim: int | None = None,
        rotation: str = "retnet",
        norm_affine: bool = False,
        norm_eps: float = 1e-6,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or ((key_dim is None or value_dim is None) and dim % heads):
            checks.fail("heads", heads, f"a divisor of dim = {dim}, or key_dim and value_dim")
        if rotation not in ROTATIONS:
            checks.fail("rotation", repr(rotation), f"one of {', '.join(ROTATIONS)}")
        key_dim = dim // heads if key_dim is None else key_dim
        value_dim = 2 * dim // heads if value_dim is None else value_dim
        if rotation != "none" and key_dim % 2:
            checks.fail("key_dim", key_dim, "an even number of channels to turn")
        self.heads, self.key_dim, self.value_dim, self.rotation = heads, key_dim, value_dim, rotation
        self.dtype, self.implementation = dtype, implementation

        # Xavier with the gains of the authors' code
        inner = nnx.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform")
        outer = nnx.initializers.variance_scaling(2.0**-2, "fan_avg", "uniform")
        keys, values = heads * key_dim, heads * value_dim
        into: dict[str, Any] = {"axes": ("embed", "heads"), "initializer": inner, "dtype": dtype, "rngs": rngs}
        self.q_proj = Projection(dim, keys, **into)
        self.k_proj = Projection(dim, keys, **into)
        self.v_proj = Projection(dim, values, **into)
        self.gate_proj = Projection(dim, values, **into)
        self.norm = RMSNorm(value_dim, affine=norm_affine, eps=norm_eps, axis="head", dtype=dtype)
        self.out_proj = Projection(values, dim, ("heads", "embed"), initializer=outer, dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> RetentionState:
        """`max_length` is of no consequence here: the state has one size."""
        return RetentionState(
            memory=jnp.zeros((batch_size, self.heads, self.key_dim, self.value_dim), jnp.float32),
            position=jnp.zeros((batch_size,), jnp.int32),
            document=no_document(batch_size),
        )

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: the recurrence, one write and one read."""
        return 4 * self.heads * self.key_dim * self.value_dim

    def _rotate(self, x: Float[Array, "B T H K"], positions: Positions) -> Float[Array, "B T H K"]:
        if self.rotation == "none":
            return x
        return pair_rotation(x, positions) if self.rotation == "retnet" else rope(x, positions)

    def __call__(
        self,
        x: Hidden,
        state: RetentionState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, RetentionState | None]:
        """`positions` [B, T] turn queries and keys; None counts from the start of each document."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        batch, length, _ = x.shape
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        memory, start = (None, None) if state is None else state[:2]
        positions, following = document_positions((batch, length), start, segment_ids, positions)

        q = self.q_proj(x).reshape(batch, length, self.heads, self.key_dim)
        k = self.k_proj(x).reshape(batch, length, self.heads, self.key_dim)
        v = self.v_proj(x).reshape(batch, length, self.heads, self.value_dim)
        o, memory = scalar_decay(
            self._rotate(q, positions),
            self._rotate(k, positions) * self.key_dim**-0.5,
            v,
            retention_decay(self.heads),
            scale=1.0,
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        gate = jax.nn.silu(self.gate_proj(x).astype(jnp.float32))
        y = self.out_proj(gate * self.norm(o).reshape(gate.shape))
        if state is None:
            return y, None
        return y, RetentionState(memory, following, new_document(state.document, segment_ids))
