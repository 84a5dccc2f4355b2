"""What the time mixes of RWKV-5 and RWKV-6 share: all but how tokens are mixed and how fast the memory forgets
(Peng et al. 2024, arXiv:2404.05892)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers import rwkv_start
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.layer_norm import LayerNorm
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.token_shift import init_shift, token_shift
from effattn_jax.linear import vector_decay
from effattn_jax.typing import Array, Float, Hidden, Int, MatrixState, Positions, SegmentIds

LARGEST_W = 5.0  # e^{-e^5} is 0 in float32; the exponentials of larger numbers overflow and have no gradient


class RWKVState(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: MatrixState  # [B, H, N, N], keys by values
    shift: Float[Array, "B 1 D"]
    document: Int[Array, " B"]


class Mixed(NamedTuple):
    """A token with the one before it, in four shares, and the decay e^{-e^w}."""

    r: Hidden
    k: Hidden
    v: Hidden
    g: Hidden
    w: Float[Array, "B T D"] | Float[Array, " D"]  # float32


class RWKVTimeMix(nnx.Module):
    """r = W_r x_r, k = W_k x_k, v = W_v x_v; for every head, of N channels of each,

        S_t = diag(e^{-e^w}) S_{t-1} + k_t v_t^T,   o_t = S_{t-1}^T r_t + (r_t . (u * k_t)) v_t
        output = W_o (LayerNorm(o) * silu(W_g x_g))

    which is `vector_decay` with a bonus and scale 1. A mechanism says in `mixed` what x_r, x_k, x_v, x_g and w are.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int,
        norm_eps: float,
        layer_index: int | Array,
        layer_count: int,
        dtype: Any,
        implementation: Implementation,
        rngs: nnx.Rngs,
    ):
        if head_dim < 1 or dim % head_dim:
            checks.fail("head_dim", head_dim, f"a divisor of dim = {dim}")
        self.heads, self.head_dim = dim // head_dim, head_dim
        self.dtype, self.implementation = dtype, implementation

        project = lambda start: Projection(  # noqa: E731
            dim, dim, ("embed", "heads"), initializer=start, dtype=dtype, rngs=rngs
        )
        place = (layer_index, layer_count)
        self.r_proj, self.k_proj = project(rwkv_start.ORTHOGONAL), project(rwkv_start.QUIET)
        self.v_proj, self.g_proj = project(rwkv_start.ORTHOGONAL), project(rwkv_start.QUIET)
        self.w = nnx.Param(rwkv_start.decay(dim, *place), axes=("heads",))
        self.u = nnx.Param(rwkv_start.bonus(dim, *place), axes=("heads",))
        self.norm = LayerNorm(dim, groups=self.heads, eps=norm_eps, axis="heads", dtype=jnp.float32)
        self.norm.scale[...] = rwkv_start.norm_scale(dim, *place)
        self.out_proj = Projection(dim, dim, ("heads", "embed"), initializer=rwkv_start.SILENT, dtype=dtype, rngs=rngs)

    def mixed(self, x: Hidden, before: Hidden) -> Mixed:
        raise NotImplementedError

    def init_state(self, batch_size: int, max_length: int) -> RWKVState:
        """`max_length` is of no consequence here: the state has one size."""
        return RWKVState(
            memory=jnp.zeros((batch_size, self.heads, self.head_dim, self.head_dim), jnp.float32),
            shift=init_shift(batch_size, self.heads * self.head_dim, self.dtype),
            document=no_document(batch_size),
        )

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: the recurrence, one write and one read."""
        return 4 * self.heads * self.head_dim * self.head_dim

    def __call__(
        self,
        x: Hidden,
        state: RWKVState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, RWKVState | None]:
        """`positions` is of no consequence here: the recurrence knows the order."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        memory, shift = (None, None) if state is None else state[:2]

        x = x.astype(self.dtype)
        before, shift = token_shift(x, shift, segment_ids)
        mixed = self.mixed(x, before)
        by_heads = lambda y: y.reshape(*y.shape[:-1], self.heads, self.head_dim)  # noqa: E731
        o, memory = vector_decay(
            by_heads(self.r_proj(mixed.r)),
            by_heads(self.k_proj(mixed.k)),
            by_heads(self.v_proj(mixed.v)),
            by_heads(-jnp.exp(jnp.minimum(mixed.w, LARGEST_W))),
            bonus=by_heads(self.u[...]),
            scale=1.0,
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        gate = jax.nn.silu(self.g_proj(mixed.g).astype(jnp.float32))
        y = self.out_proj(self.norm(o.reshape(x.shape)) * gate)
        if state is None or shift is None:
            return y, None
        return y, RWKVState(memory, shift, new_document(state.document, segment_ids))
