"""Fast weights: a matrix memory that adds or replaces associations (Schlag et al. 2021, arXiv:2102.11174)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.buffer import Buffer, constant
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.projection import Projection
from effattn_jax.linear import delta_rule, scalar_decay
from effattn_jax.linear.favor import draw_omega, favor_exponent
from effattn_jax.linear.feature_maps import dpfp, elu_plus_one, sum_normalise
from effattn_jax.typing import Array, Float, Hidden, Int, MatrixState, Positions, SegmentIds


class FastWeightState(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: MatrixState  # [B, H, F, V]
    document: Int[Array, " B"]


class FastWeight(nnx.Module):
    """q, k, v = projections of the input, beta = sigmoid(projection); for every head, with phi / sum(phi) as features,

        sum    W_t = W_{t-1} + phi(k_t) v_t^T
        delta  W_t = W_{t-1} + beta_t phi(k_t) (v_t - W_{t-1}^T phi(k_t))^T
        o_t = K^{-1/2} W_t^T phi(q_t)
        output = W_out o

    The delta rule replaces what the memory holds under a key. The features sum to one, without which it diverges.

    Args:
      dim: D.
      heads: H.
      head_dim: K = V of a head; None means D / H.
      update: "delta" or "sum".
      feature_map: "dpfp", "elu" (elu + 1) or "favor" (positive random features).
      nu: of "dpfp", which has 2 K nu features.
      features: of "favor"; None means K ln K. The random vectors are a buffer.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        update: str = "delta",
        feature_map: str = "dpfp",
        nu: int = 1,
        features: int | None = None,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or (head_dim is None and dim % heads):
            checks.fail("heads", heads, f"a divisor of dim = {dim}, or head_dim")
        if update not in ("delta", "sum"):
            checks.fail("update", repr(update), "delta or sum")
        if feature_map not in ("dpfp", "elu", "favor"):
            checks.fail("feature_map", repr(feature_map), "dpfp, elu or favor")
        if nu < 1:
            checks.fail("nu", nu, "at least 1")
        head_dim = dim // heads if head_dim is None else head_dim
        features = max(1, int(head_dim * math.log(head_dim))) if features is None else features
        self.heads, self.head_dim, self.nu, self.feature_map = heads, head_dim, nu, feature_map
        self.features = {"dpfp": 2 * head_dim * nu, "elu": head_dim, "favor": features}[feature_map]
        self.dtype, self.implementation = dtype, implementation

        self.q_proj = Projection(dim, heads * head_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k_proj = Projection(dim, heads * head_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v_proj = Projection(dim, heads * head_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        delta = update == "delta"
        self.beta_proj = Projection(dim, heads, ("embed", "heads"), dtype=dtype, rngs=rngs) if delta else None
        self.out_proj = Projection(heads * head_dim, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)
        if feature_map == "favor":
            self.omega = Buffer(draw_omega(rngs.params(), features, head_dim), axes=("state", "head"))

    def init_state(self, batch_size: int, max_length: int) -> FastWeightState:
        """`max_length` is of no consequence here: the state has one size."""
        shape = (batch_size, self.heads, self.features, self.head_dim)
        return FastWeightState(jnp.zeros(shape, jnp.float32), no_document(batch_size))

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: one write and one read, and with the delta
        rule a read before the write."""
        return (4 if self.beta_proj is None else 6) * self.heads * self.features * self.head_dim

    def __call__(
        self,
        x: Hidden,
        state: FastWeightState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, FastWeightState | None]:
        """`positions` is of no consequence here."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        shape = (*x.shape[:2], self.heads, self.head_dim)
        q, k, v = (project(x).reshape(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._phi(q), self._phi(k)
        options: dict[str, Any] = {
            "scale": self.head_dim**-0.5,
            "initial_state": None if state is None else state.memory,
            "segment_ids": segment_ids,
            "implementation": self.implementation,
        }
        if self.beta_proj is None:
            o, memory = scalar_decay(q, k, v, **options)
        else:
            beta = jax.nn.sigmoid(self.beta_proj(x).astype(jnp.float32))
            o, memory = delta_rule(q, k, v, beta, **options)
        y = self.out_proj(o.reshape(*x.shape[:2], self.heads * self.head_dim))
        return y, None if state is None else FastWeightState(memory, new_document(state.document, segment_ids))

    def _phi(self, x: Float[Array, "B T H K"]) -> Float[Array, "B T H F"]:
        """Features that sum to one."""
        x = x.astype(jnp.float32)
        if self.feature_map == "favor":  # any factor cancels in the sum
            return jax.nn.softmax(favor_exponent(x, constant(self.omega)), axis=-1).astype(self.dtype)
        return sum_normalise(dpfp(x, self.nu) if self.feature_map == "dpfp" else elu_plus_one(x)).astype(self.dtype)
