"""The affine map of a chunk whose tokens each change the state by a matrix of rank 1, and the states between chunks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.linear.affine import DenseMap, entering_states
from effattn_jax.precision import contract
from effattn_jax.typing import Array, Float, MatrixState


class LowRankMap(NamedTuple):
    """S -> diag(keep) S + left^T X + write with X = values + right S: dense only where maps are composed."""

    keep: Float[Array, "... 1|K 1"]
    left: Float[Array, "... C K"]
    right: Float[Array, "... C K"]
    values: Float[Array, "... C V"]
    write: Float[Array, "... K V"] | None = None

    def inner(self, state: Float[Array, "... K V"]) -> Float[Array, "... C V"]:
        """X, which depends on the state that enters."""
        return self.values + contract("...ck,...kv->...cv", self.right, state.astype(self.right.dtype))

    def outer(self, state: Float[Array, "... K V"], inner: Float[Array, "... C V"]) -> Float[Array, "... K V"]:
        """The state that leaves."""
        state = self.keep * state + contract("...ck,...cv->...kv", self.left, inner.astype(self.left.dtype))
        return state if self.write is None else state + self.write

    def dense(self) -> DenseMap:
        change = contract("...ci,...cj->...ij", self.left, self.right)
        transition = self.keep * jnp.eye(change.shape[-1], dtype=change.dtype) + change
        return DenseMap(transition, self.outer(jnp.zeros_like(change, shape=(1, 1)), self.values))


def states_between(
    maps: LowRankMap, state: MatrixState, *, associative: bool
) -> tuple[Float[Array, "B N H K V"], Float[Array, "B N H C V"], MatrixState]:
    """From leaves [B, N, H, ...] in order: the state that enters each of N chunks, its X, and the last state."""
    keep = jnp.broadcast_to(maps.keep, (*maps.values.shape[:3], *maps.keep.shape[3:]))
    by_chunk = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), maps._replace(keep=keep))
    if associative:
        entering, state = entering_states(by_chunk.dense(), state, associative=True)
        inner = by_chunk.inner(entering)
    else:

        def step(state: Array, chunk: LowRankMap) -> tuple[Array, tuple[Array, Array]]:
            inner = chunk.inner(state)
            return chunk.outer(state, inner), (state, inner)

        state, (entering, inner) = jax.lax.scan(step, state, by_chunk, unroll=2)
    return jnp.moveaxis(entering, 0, 1), jnp.moveaxis(inner, 0, 1), state
