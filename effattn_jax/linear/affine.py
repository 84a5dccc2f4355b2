"""Affine maps of a memory: what some tokens do to the state before them, S -> P S + R.

Every memory with a linear update has one, for any run of tokens, and the maps of consecutive runs compose:
(P2, R2) o (P1, R1) = (P2 P1, P2 R1 + R2). So chunks can be combined by a scan, by `lax.associative_scan`, or across
devices that hold parts of one sequence.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

from effattn_jax.precision import contract
from effattn_jax.typing import Array, Float


class AffineMap(Protocol):
    """A pytree of a transition and an addition."""

    def after(self, earlier: Self) -> Self:
        """The map of the earlier tokens, then this one."""

    def __call__(self, state: Array) -> Array: ...


class DiagonalMap(NamedTuple):
    """P scales rows of the state: keep is [..., K, 1], or [..., 1, 1] where all rows decay alike."""

    keep: Float[Array, "... K 1"]
    write: Float[Array, "... K V"]

    def after(self, earlier: "DiagonalMap") -> "DiagonalMap":
        return DiagonalMap(self.keep * earlier.keep, self.keep * earlier.write + self.write)

    def __call__(self, state: Float[Array, "... K V"]) -> Float[Array, "... K V"]:
        return self.keep * state + self.write


class DenseMap(NamedTuple):
    """P mixes rows of the state; composing two costs K^3."""

    transition: Float[Array, "... K K"]
    write: Float[Array, "... K V"]

    def after(self, earlier: "DenseMap") -> "DenseMap":
        return DenseMap(contract("...ij,...jk->...ik", self.transition, earlier.transition), self(earlier.write))

    def __call__(self, state: Float[Array, "... K V"]) -> Float[Array, "... K V"]:
        return contract("...ij,...jv->...iv", self.transition, state) + self.write


def entering_states[M: AffineMap](maps: M, state: Array, *, associative: bool = False) -> tuple[Array, Array]:
    """States between chunks: leaves of `maps` are [N, ...] in order.

    Returns the state [N, ...] that enters each chunk, and the last one. `associative` composes the maps by
    `lax.associative_scan`, in log N steps, instead of applying them one after the other.
    """
    if associative:
        upto: M = jax.lax.associative_scan(lambda earlier, later: later.after(earlier), maps)
        left = jax.vmap(lambda one: one(state))(upto)
        return jnp.concatenate([state[None], left[:-1]])[: len(left)], left[-1] if len(left) else state

    def step(state: Array, chunk: M) -> tuple[Array, Array]:
        return chunk(state), state

    state, entering = jax.lax.scan(step, state, maps, unroll=4)
    return entering, state


def diagonal_map(
    final_state: Callable[[Array, bool], Array], keys: Array, heads: int, key_dim: int, value_dim: int
) -> DiagonalMap:
    """The map of all tokens of a call, from its final state.

    `final_state(initial_state, write)` runs the engine from a state; without `write` the values are zeros.
    """
    like = jnp.zeros_like(keys, shape=(keys.shape[0], heads, key_dim, value_dim), dtype=jnp.float32)
    return DiagonalMap(final_state(jnp.ones_like(like[..., :1]), False), final_state(like, True))


def dense_map(
    final_state: Callable[[Array, bool], Array], keys: Array, heads: int, key_dim: int, value_dim: int
) -> DenseMap:
    """`diagonal_map` for transitions that mix rows: the identity in, without writes, P out."""
    like = jnp.zeros_like(keys, shape=(keys.shape[0], heads, key_dim, value_dim), dtype=jnp.float32)
    identity = jnp.eye(key_dim) + jnp.zeros_like(like[..., :1])
    return DenseMap(final_state(identity, False), final_state(like, True))
