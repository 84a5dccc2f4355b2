"""Attention to a window of the past and to learned tokens that are always there: what Titans joins to its memory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import new_document, no_document
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rope import rope
from effattn_jax.precision import contract
from effattn_jax.sparse import attention
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds


class WindowState(NamedTuple):
    """The last W - 1 tokens, padding among them."""

    k: Float[Array, "B W-1 H K"]
    v: Float[Array, "B W-1 H K"]
    segment_ids: Int[Array, "B W-1"]  # -1: padding, or no token yet
    length: Int[Array, " B"]  # tokens so far, padding among them
    document: Int[Array, " B"]


class WindowAttention(nnx.Module):
    """o_i = softmax over [p, x_{i-W+1} .. x_i] in heads: N_p learned tokens p, then the window in i's document.

    Queries and keys of the window are turned by rotary positions; p has no place, and is read by queries as they are.
    Both parts are softmaxes of their own, joined by their sums of exponentials. The heads come out side by side,
    without an output projection.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        window: int,
        persistent: int,
        rope_theta: float | None,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        if window < 1:
            checks.fail("window", window, "at least 1 token")
        if persistent < 0:
            checks.fail("persistent", persistent, "at least 0 tokens")
        if rope_theta is not None and head_dim % 2:
            checks.fail("head_dim", head_dim, "an even number of channels, or rope_theta None")
        self.heads, self.head_dim, self.window, self.rope_theta = heads, head_dim, window, rope_theta
        self.dtype, self.implementation = dtype, implementation
        inner = heads * head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            Projection(dim, inner, ("embed", "heads"), dtype=dtype, rngs=rngs) for _ in range(3)
        )
        self.persistent = persistent_tokens(persistent, dim, rngs)

    def init_state(self, batch_size: int) -> WindowState:
        shape = (batch_size, self.window - 1, self.heads, self.head_dim)
        return WindowState(
            k=jnp.zeros(shape, self.dtype),
            v=jnp.zeros(shape, self.dtype),
            segment_ids=jnp.full(shape[:2], -1, jnp.int32),
            length=jnp.zeros(batch_size, jnp.int32),
            document=no_document(batch_size),
        )

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections, on average over a causal row."""
        persistent = 0 if self.persistent is None else self.persistent.shape[0]
        return 4 * self.heads * self.head_dim * (persistent + min(self.window, (length + 1) / 2))

    def by_head(self, x: Float[Array, "*batch HK"]) -> Float[Array, "*batch H K"]:
        return x.reshape(*x.shape[:-1], self.heads, self.head_dim)

    def __call__(
        self,
        x: Hidden,
        state: WindowState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Float[Array, "B T HK"], WindowState | None]:
        """`positions` [B, T] turn queries and keys; None counts on from the tokens before."""
        batch, length, _ = x.shape
        q, k, v = (self.by_head(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        turned = q
        if self.rope_theta is not None:
            if positions is None:
                positions = (0 if state is None else state.length[:, None]) + jnp.arange(length)[None]
            turned, k = (rope(y, positions, theta=self.rope_theta) for y in (q, k))
        ids = segment_ids
        if state is not None:
            document = new_document(state.document, segment_ids)
            own = jnp.broadcast_to(document[:, None], (batch, length)) if segment_ids is None else segment_ids
            own = jnp.where(own >= 0, own, -1).astype(jnp.int32)
            before = (state.k, state.v, state.segment_ids)
            k, v, ids = (jnp.concatenate(pair, 1) for pair in zip(before, (k, v, own), strict=True))
            last = lambda y: y[:, y.shape[1] - (self.window - 1) :]  # noqa: E731
            state = WindowState(last(k), last(v), last(ids), state.length + length, document)
        out, lse = attention(
            turned,
            k,
            v,
            window=self.window,
            segment_ids=ids,
            implementation=self.implementation,
            return_lse=True,
        )
        if self.persistent is not None:
            p = self.persistent[...]
            always, other = attend_to_all(q, self.by_head(self.k_proj(p)), self.by_head(self.v_proj(p)))
            share = jax.nn.sigmoid(lse - other)[..., None]
            out = (share * out + (1 - share) * always).astype(self.dtype)
        return out.reshape(batch, length, self.heads * self.head_dim), state


def persistent_tokens(count: int, dim: int, rngs: nnx.Rngs) -> nnx.Param | None:
    """Learned tokens, of the size of a normed one."""
    if count == 0:
        return None
    return nnx.Param(jax.random.normal(rngs.params(), (count, dim), jnp.float32), axes=("state", "embed"))


def attend_to_all(
    q: Float[Array, "B T H K"], k: Float[Array, "N H K"], v: Float[Array, "N H K"]
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H"]]:
    """Softmax over the same N keys for every query, and the logarithm of its denominator."""
    s = q.shape[-1] ** -0.5 * contract("bthk,nhk->bthn", q, k)
    lse = jax.nn.logsumexp(s, axis=-1)
    return contract("bthn,nhk->bthk", jnp.exp(s - lse[..., None]), v.astype(s.dtype)), lse
