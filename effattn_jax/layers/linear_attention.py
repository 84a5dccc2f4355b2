"""Linear attention with a choice of feature maps (Katharopoulos et al. 2020, arXiv:2006.16236)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.feature_map import FeatureMap
from effattn_jax.layers.positions import document_positions
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.linear import linear_attention
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds


class LinearAttentionState(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: Float[Array, "B H F V+1"]  # the last column is the normaliser, where there is one
    position: Int[Array, " B"]  # of the next token in its document
    document: Int[Array, " B"]


class LinearAttention(nnx.Module):
    """q, k, v = projections of the input; for every head, with features phi,

        S_t = S_{t-1} + phi(k_t) v_t^T,   z_t = z_{t-1} + phi(k_t)
        o_t = S_t^T phi(q_t) / (z_t . phi(q_t) + eps)
        output = W_out o

    Feature maps (`effattn_jax.linear.feature_maps`): "elu" (elu + 1; Katharopoulos et al.), "cosformer" (Qin et al.
    2022, arXiv:2202.08791), "taylor" (Based; Arora et al. 2024, arXiv:2402.18668, with key_dim 16), "hedgehog" (Zhang
    et al. 2024, arXiv:2402.04347), "t2r" (Kasai et al. 2021, arXiv:2103.13076), "dpfp" (Schlag et al. 2021,
    arXiv:2102.11174), "rebased" (Aksenov et al. 2024, arXiv:2402.10644), "relu", "squared_relu", "identity",
    "elementwise_product".

    Args:
      dim: D.
      heads: H of the queries.
      kv_heads: heads of keys and values, each shared by consecutive query heads; None means H.
      key_dim, value_dim: K and V of a head; None means D / H.
      feature_map: a name of the list above.
      tie_feature_map: queries and keys share the weights of the map.
      share_feature_map: all heads share the weights of the map (flash-linear-attention).
      feature_dim: F of the maps "hedgehog" (which has 2 F features), "t2r" and "elementwise_product"; None means K.
      nu: of "dpfp", which has 2 K nu features.
      max_length: of "cosformer", M, fixed for training and decoding: the most tokens of a document.
      normalise: divide by z_t . phi(q_t).
      eps: added to the denominator; "cosformer" has no eps but a floor of 1e-6.
      scale: factor on phi(q); None means F**-0.5.
      output_norm: RMSNorm over each head's output.
      norm_eps: its eps.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        feature_map: str = "elu",
        tie_feature_map: bool = False,
        share_feature_map: bool = False,
        feature_dim: int | None = None,
        nu: int = 1,
        max_length: int | None = None,
        normalise: bool = True,
        eps: float = 1e-6,
        scale: float | None = 1.0,
        output_norm: bool = False,
        norm_eps: float = 1e-5,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        if (key_dim is None or value_dim is None) and (heads < 1 or dim % heads):
            checks.fail("heads", heads, f"a divisor of dim = {dim}, or key_dim and value_dim")
        kv_heads = heads if kv_heads is None else kv_heads
        checks.check_head_groups("kv_heads", kv_heads, "the queries", heads)
        key_dim = dim // heads if key_dim is None else key_dim
        value_dim = dim // heads if value_dim is None else value_dim
        self.heads, self.kv_heads, self.key_dim, self.value_dim = heads, kv_heads, key_dim, value_dim
        self.normalise, self.scale = normalise, scale
        self.eps, self.floor = (0.0, 1e-6) if feature_map == "cosformer" else (eps, 0.0)
        self.dtype, self.implementation = dtype, implementation

        self.q_proj = Projection(dim, heads * key_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k_proj = Projection(dim, kv_heads * key_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v_proj = Projection(dim, kv_heads * value_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.out_proj = Projection(heads * value_dim, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

        def phi(heads: int) -> FeatureMap:
            return FeatureMap(
                feature_map,
                heads,
                key_dim,
                feature_dim=feature_dim,
                nu=nu,
                max_length=max_length,
                shared=share_feature_map,
                dtype=dtype,
                rngs=rngs,
            )

        if tie_feature_map:
            checks.check_head_groups("kv_heads", heads, "keys, where they share a feature map,", kv_heads)
        self.phi = phi(heads)
        self.k_phi = None if tie_feature_map else phi(kv_heads)
        self.norm = RMSNorm(value_dim, eps=norm_eps, axis="head", dtype=dtype) if output_norm else None

    def init_state(self, batch_size: int, max_length: int) -> LinearAttentionState:
        """`max_length` is of no consequence here: the state has one size."""
        shape = (batch_size, self.heads, self.phi.features, self.value_dim + self.normalise)
        return LinearAttentionState(
            memory=jnp.zeros(shape, jnp.float32),
            position=jnp.zeros((batch_size,), jnp.int32),
            document=no_document(batch_size),
        )

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: the recurrence, one write and one read."""
        return 4 * self.heads * self.phi.features * (self.value_dim + self.normalise)

    def __call__(
        self,
        x: Hidden,
        state: LinearAttentionState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, LinearAttentionState | None]:
        """`positions` [B, T] are those of cosformer; None counts from the start of each document."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        batch, length, _ = x.shape
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        memory, start = (None, None) if state is None else state[:2]
        positions, following = document_positions((batch, length), start, segment_ids, positions)

        q = self.q_proj(x).reshape(batch, length, self.heads, self.key_dim)
        k = self.k_proj(x).reshape(batch, length, self.kv_heads, self.key_dim)
        v = self.v_proj(x).reshape(batch, length, self.kv_heads, self.value_dim)
        o, memory = linear_attention(
            self.phi(q, positions),
            (self.phi if self.k_phi is None else self.k_phi)(k, positions),
            v,
            normalise=self.normalise,
            eps=self.eps,
            floor=self.floor,
            scale=self.scale,
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        if self.norm is not None:
            o = self.norm(o)
        y = self.out_proj(o.reshape(batch, length, self.heads * self.value_dim))
        if state is None:
            return y, None
        return y, LinearAttentionState(memory, following, new_document(state.document, segment_ids))
