"""What the layers of routed attention share: rotated queries, what is remembered of every token, and documents."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import new_document, no_document
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.layers.rope import rope
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds


class RoutedState(NamedTuple):
    """The last S real tokens, the newest last; slots that hold none come first."""

    tokens: tuple[Float[Array, "B S ..."], ...]
    segment_ids: Int[Array, "B S"]  # -1: none
    length: Int[Array, " B"]  # tokens so far, padding among them
    document: Int[Array, " B"]


class RoutedAttention(nnx.Module):
    """y = W_out read(q, what is remembered), with projections, norms and rotations as in `Attention`.

    A token is remembered by its rotated key and its value, and by what `remember` adds. Blocks are counted from the
    first real token of each document: padding, wherever it is, takes no place. A step of decoding goes over all that
    is remembered, for its selector too; the caches of `effattn_jax.sparse` (`cached_moba`, ...) keep that part.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        rope_theta: float | None = 10_000.0,
        norm_eps: float = 1e-6,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1:
            checks.fail("heads", heads, "at least 1")
        checks.check_head_groups("kv_heads", kv_heads, "the queries", heads)
        if head_dim is None and dim % heads:
            checks.fail("heads", heads, f"a divisor of dim = {dim}, or head_dim")
        head_dim = dim // heads if head_dim is None else head_dim
        if rope_theta is not None and head_dim % 2:
            checks.fail("head_dim", head_dim, "an even number of channels, or rope_theta None")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rope_theta, self.dtype, self.implementation = rope_theta, dtype, implementation
        into: dict[str, Any] = {"axes": ("embed", "heads"), "dtype": dtype, "rngs": rngs}
        self.q_proj = Projection(dim, heads * head_dim, **into)
        self.k_proj = Projection(dim, kv_heads * head_dim, **into)
        self.v_proj = Projection(dim, kv_heads * head_dim, **into)
        self.out_proj = Projection(heads * head_dim, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)
        norm: dict[str, Any] = {"eps": norm_eps, "axis": "head", "dtype": dtype}
        self.q_norm = RMSNorm(head_dim, **norm) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, **norm) if qk_norm else None

    def remember(self, x: Hidden, positions: Positions) -> tuple[Float[Array, "B T ..."], ...]:
        """Keys, values, and what else `read` needs of every token."""
        return self.key(self.k_proj(x), positions), self.by_head(self.v_proj(x))

    def ask(self, x: Hidden, positions: Positions) -> tuple[Float[Array, "B T ..."], ...]:
        """Queries, and what else `read` needs of the new tokens."""
        q = self.by_head(self.q_proj(x))
        return (self.rotated(q if self.q_norm is None else self.q_norm(q), positions),)

    def read(
        self, asked: tuple[Array, ...], remembered: tuple[Array, ...], segment_ids: Int[Array, "B M"] | None
    ) -> Float[Array, "B T H V"]:
        """What the last T of M tokens read."""
        raise NotImplementedError

    def by_head(self, x: Float[Array, "B T HK"]) -> Float[Array, "B T H K"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def key(self, k: Float[Array, "B T GK"], positions: Positions | None) -> Float[Array, "B T G K"]:
        """Normed, and rotated where there are positions."""
        k = self.by_head(k)
        k = k if self.k_norm is None else self.k_norm(k)
        return k if positions is None else self.rotated(k, positions)

    def rotated(self, x: Float[Array, "B T H K"], positions: Positions) -> Float[Array, "B T H K"]:
        return x if self.rope_theta is None else rope(x, positions, theta=self.rope_theta)

    def init_state(self, batch_size: int, max_length: int) -> RoutedState:
        """Of `max_length` tokens."""
        shapes = jax.eval_shape(
            lambda: self.remember(jnp.zeros((batch_size, max_length, self.k_proj.kernel.shape[0])), jnp.zeros((1, 1)))
        )
        return RoutedState(
            tuple(jnp.zeros(x.shape, x.dtype) for x in shapes),
            jnp.full((batch_size, max_length), -1, jnp.int32),
            jnp.zeros(batch_size, jnp.int32),
            no_document(batch_size),
        )

    def __call__(
        self,
        x: Hidden,
        state: RoutedState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, RoutedState | None]:
        """`positions` [B, T] turn queries and keys; None counts on from the tokens before."""
        batch, length, _ = x.shape
        checks.check_segment_ids(segment_ids, batch, length)
        if length == 0:
            return jnp.zeros_like(x, dtype=self.dtype), state
        if positions is None:
            positions = (0 if state is None else state.length[:, None]) + jnp.arange(length)[None]
        asked, new = self.ask(x, positions), self.remember(x, positions)
        if state is None and segment_ids is None:
            out = self.read(asked, new, None)
            return self.out_proj(out.reshape(batch, length, -1)), None

        document = None if state is None else new_document(state.document, segment_ids)
        if segment_ids is None and document is not None:
            segment_ids = jnp.broadcast_to(document[:, None], (batch, length))
        ids = jnp.where(jnp.asarray(segment_ids) >= 0, jnp.asarray(segment_ids), -1).astype(jnp.int32)
        order = _padding_first(ids)
        asked, new, kept = _take(asked, order), _take(new, order), _take(ids, order)
        if state is not None:
            new = tuple(jnp.concatenate(pair, axis=1) for pair in zip(state.tokens, new, strict=True))
            kept = jnp.concatenate([state.segment_ids, kept], axis=1)
            newest_last = _padding_first(kept)
            new, kept = _take(new, newest_last), _take(kept, newest_last)
        out = _take(self.read(asked, new, kept), jnp.argsort(order, axis=1))
        out = jnp.where((ids >= 0)[:, :, None, None], out, 0)
        if state is not None and document is not None:
            slots = state.segment_ids.shape[1]
            last = tuple(y[:, y.shape[1] - slots :] for y in new)
            state = RoutedState(last, kept[:, kept.shape[1] - slots :], state.length + length, document)
        return self.out_proj(out.reshape(batch, length, -1)), state


def _padding_first(ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The order in which real tokens, as they are, come last."""
    return jnp.argsort(ids >= 0, axis=1, stable=True)


def _take[Tree](tree: Tree, order: Int[Array, "B T"]) -> Tree:
    return jax.tree.map(lambda y: jax.vmap(lambda row, which: row[which])(y, order), tree)
