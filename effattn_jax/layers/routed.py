"""What the layers of routed attention share: rotated queries, what is remembered of every token, and documents."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import continues, first_document, new_document, no_document
from effattn_jax.layers.heads import Heads
from effattn_jax.typing import Array, Bool, Float, Hidden, Int, Positions, SegmentIds

Arrays = tuple[Array, ...]  # [B, T, ...] each


class RoutedState(NamedTuple):
    """The document that each row is in: its real tokens, the one at position p in slot p, and what chooses of them."""

    cache: Any  # of the mechanism, with a length [B]
    length: Int[Array, " B"]  # tokens so far, padding among them
    document: Int[Array, " B"]


class RoutedAttention(Heads):
    """y = W_out read(q, what is remembered), with projections, norms and rotations as in `Attention`.

    A token is remembered by its rotated key and its value, and by what `remember` adds. Blocks are counted from the
    first real token of each document: padding, wherever it is, takes no place. A state holds up to `max_length` real
    tokens of one document, which the next one replaces; more are an error, under `jax.jit` the caller must see to it.

    A step of decoding writes a token, adds to what chooses (mean or compressed keys), looks at that, and touches the
    chosen tokens only. More tokens over a state cost what each alone does, and those of documents that begin among them
    what a row without state does.
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
        self,
        asked: Arrays,
        remembered: Arrays,
        segment_ids: Int[Array, "B T"] | None,
        cache: Any = None,
    ) -> Float[Array, "B T H V"]:
        """What the tokens of a row read that is not in the cache of the call, if it has one."""
        raise NotImplementedError

    def init_cache(self, batch_size: int, capacity: int) -> Any:
        """A NamedTuple with a field `length`."""
        raise NotImplementedError

    def append(self, remembered: Arrays, cache: Any, new: Int[Array, " B"] | None) -> Any:
        """The cache with the first `new` of T tokens of each row, or all."""
        raise NotImplementedError

    def step(
        self, asked: Arrays, remembered: Arrays, cache: Any, new: Int[Array, " B"] | None
    ) -> tuple[Float[Array, "B T H V"], Any]:
        """What they read over the cache and themselves, and `append`."""
        raise NotImplementedError

    def init_state(self, batch_size: int, max_length: int) -> RoutedState:
        """Of `max_length` tokens."""
        zeros = jnp.zeros(batch_size, jnp.int32)
        cache = self.init_cache(batch_size, max_length)._replace(length=zeros)
        return RoutedState(cache, zeros, no_document(batch_size))

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
        ids = None if segment_ids is None else jnp.maximum(jnp.asarray(segment_ids), -1).astype(jnp.int32)
        if state is None:
            return self.joined(self.read(asked, new, None) if ids is None else self._packed(asked, new, ids)), None
        if ids is None:
            out, cache = self.step(asked, new, state.cache, None)
        else:
            out, cache = self._continued(asked, new, state, ids)
        return self.joined(out), RoutedState(cache, state.length + length, new_document(state.document, ids))

    def _packed(self, asked: Arrays, new: Arrays, ids: Int[Array, "B T"], cache: Any = None) -> Float[Array, "B T H V"]:
        """`read` of rows with padding anywhere."""
        order = _last(ids >= 0)
        out = self.read(_take(asked, order), _take(new, order), _take(ids, order), cache)
        return _real(_take(out, jnp.argsort(order, axis=1)), ids >= 0)

    def _continued(
        self, asked: Arrays, new: Arrays, state: RoutedState, ids: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T H V"], Any]:
        """The first document of each row over the cache, the others as rows of their own; the last one stays."""
        real, first = ids >= 0, first_document(ids)[:, None]
        mine = real & (ids == first)
        cache = _keep(state.cache, continues(ids, state.document))
        if ids.shape[1] == 1:
            out, cache = self.step(asked, new, cache, _count(mine))
            return _real(out, real), cache
        order = _last(~mine)
        out, cache = self.step(_take(asked, order), _take(new, order), cache, _count(mine))
        out = _real(_take(out, jnp.argsort(order, axis=1)), mine)
        others = real & ~mine

        def packed() -> tuple[Array, Any]:
            of_last = others & (ids == jnp.max(ids, axis=1, keepdims=True))
            emptied = _keep(cache, ~jnp.any(others, axis=1))
            last = self.append(_take(new, _last(~of_last)), emptied, _count(of_last))
            return jnp.where(others[:, :, None, None], self._packed(asked, new, ids, cache), out), last

        return jax.lax.cond(jnp.any(others), packed, lambda: (out, cache))


def _keep[Cache: NamedTuple](cache: Cache, rows: Bool[Array, " B"]) -> Cache:
    """Nothing of other rows."""
    return cache._replace(length=jnp.where(rows, cache.length, 0))  # type: ignore[attr-defined]


def _count(tokens: Bool[Array, "B T"]) -> Int[Array, " B"]:
    return jnp.sum(tokens, axis=1, dtype=jnp.int32)


def _last(tokens: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """The order in which these, as they are, come behind the others."""
    return jnp.argsort(tokens, axis=1, stable=True)


def _real(out: Float[Array, "B T H V"], tokens: Bool[Array, "B T"]) -> Float[Array, "B T H V"]:
    return jnp.where(tokens[:, :, None, None], out, 0)


def _take[Tree](tree: Tree, order: Int[Array, "B T"]) -> Tree:
    return jax.tree.map(lambda y: jax.vmap(lambda row, which: row[which])(y, order), tree)
