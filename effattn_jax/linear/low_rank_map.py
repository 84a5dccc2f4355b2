"""The affine map of a chunk whose tokens each change the state by a matrix of rank 1, and the states between chunks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.linear.affine import DenseMap, entering_states
from effattn_jax.precision import contract
from effattn_jax.typing import Array, Float, MatrixState


class LowRankMap(NamedTuple):
    """S -> diag(keep) S + left^T (right S) + write: cheaper to apply than a dense map, which only composing needs."""

    keep: Float[Array, "... 1|K 1"]
    left: Float[Array, "... C K"]
    right: Float[Array, "... C K"]
    write: Float[Array, "... K V"]

    def __call__(self, state: Float[Array, "... K V"]) -> Float[Array, "... K V"]:
        read = contract("...ck,...kv->...cv", self.right, state.astype(self.right.dtype))
        change = contract("...ck,...cv->...kv", self.left, read.astype(self.left.dtype))
        return self.keep * state + change + self.write

    def dense(self) -> DenseMap:
        change = contract("...ci,...cj->...ij", self.left, self.right)
        return DenseMap(self.keep * jnp.eye(change.shape[-1], dtype=change.dtype) + change, self.write)


def states_between(
    maps: LowRankMap, state: MatrixState, *, associative: bool
) -> tuple[Float[Array, "B N H K V"], MatrixState]:
    """From leaves [B, N, H, ...] in order: the state that enters each of N chunks, and the last one."""
    keep = jnp.broadcast_to(maps.keep, (*maps.write.shape[:3], *maps.keep.shape[3:]))
    by_chunk = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), maps._replace(keep=keep))
    if associative:
        entering, state = entering_states(by_chunk.dense(), state, associative=True)
    else:
        entering, state = entering_states(by_chunk, state)
    return jnp.moveaxis(entering, 0, 1), state
