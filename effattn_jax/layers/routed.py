"""What the layers of routed attention share: rotated queries, what is remembered of every token, and documents."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import new_document, no_document
from effattn_jax.layers.heads import Heads
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds


class RoutedState(NamedTuple):
    """The last S real tokens, the newest last; slots that hold none come first."""

    tokens: tuple[Float[Array, "B S ..."], ...]
    segment_ids: Int[Array, "B S"]  # -1: none
    length: Int[Array, " B"]  # tokens so far, padding among them
    document: Int[Array, " B"]


class RoutedAttention(Heads):
    """y = W_out read(q, what is remembered), with projections, norms and rotations as in `Attention`.

    A token is remembered by its rotated key and its value, and by what `remember` adds. Blocks are counted from the
    first real token of each document: padding, wherever it is, takes no place. A step of decoding goes over all that
    is remembered, for its selector too; the caches of `effattn_jax.sparse` (`cached_moba`, ...) keep that part.
    """

    def __init__(self, dim: int, *, implementation: Implementation = None, rngs: nnx.Rngs, **heads: Any):
        super().__init__(dim, rngs=rngs, **heads)
        self.implementation = implementation

    def remember(self, x: Hidden, positions: Positions) -> tuple[Float[Array, "B T ..."], ...]:
        """Keys, values, and what else `read` needs of every token."""
        return self.rotated(self.keys(x), positions), self.values(x)

    def ask(self, x: Hidden, positions: Positions) -> tuple[Float[Array, "B T ..."], ...]:
        """Queries, and what else `read` needs of the new tokens."""
        return (self.rotated(self.queries(x), positions),)

    def read(
        self, asked: tuple[Array, ...], remembered: tuple[Array, ...], segment_ids: Int[Array, "B M"] | None
    ) -> Float[Array, "B T H V"]:
        """What the last T of M tokens read."""
        raise NotImplementedError

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
            return self.joined(out), None

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
        return self.joined(out), state


def _padding_first(ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The order in which real tokens, as they are, come last."""
    return jnp.argsort(ids >= 0, axis=1, stable=True)


def _take[Tree](tree: Tree, order: Int[Array, "B T"]) -> Tree:
    return jax.tree.map(lambda y: jax.vmap(lambda row, which: row[which])(y, order), tree)
