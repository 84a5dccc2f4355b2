"""Blocks one after the other, and what goes from each to the next."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from effattn_jax.layers.first_value import FirstValue
from effattn_jax.layers.shared_keys import SharedKeys
from effattn_jax.models.activations import shard_batch
from effattn_jax.models.block import Block
from effattn_jax.models.handed import Handed
from effattn_jax.typing import Array, Hidden


class Carry(NamedTuple):
    """What goes up the stack."""

    x: Hidden
    first: FirstValue | None
    keys: dict[str, SharedKeys]  # the newest of each name that another layer reads


class Unit(nnx.Module):
    """One repetition of the pattern."""

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = nnx.List(blocks)

    def __call__(
        self, carry: Carry, states: Any, remat: bool, bounds: Mapping[str, Array], **where: Any
    ) -> tuple[Carry, Any]:
        """`bounds` are the lower bounds of forget gates, by the name of the blocks that read them."""
        x, first, keys = carry
        new_states = []
        for block, state in zip(self.blocks, states, strict=True):
            call = lambda block, x, state, handed: block.in_stack(x, state, handed, **where)  # noqa: E731
            handed = Handed(
                first,
                None if block.kv_from is None else keys[block.kv_from],
                None if block.bounds_name is None else bounds[block.bounds_name],
            )
            x, state, handed = (jax.checkpoint(call) if remat else call)(block, shard_batch(x), state, handed)
            first = handed.first
            if block.kv_name is not None and handed.keys is not None:
                keys = keys | {block.kv_name: handed.keys}
            new_states.append(state)
        return Carry(x, first, keys), tuple(new_states)
