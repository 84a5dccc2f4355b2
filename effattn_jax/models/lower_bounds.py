"""Lower bounds of forget gates that all blocks of a name read from one parameter of the model (HGRN; Qin et al. 2023,
arXiv:2311.04823)."""

from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx

from effattn_jax.layers import MIXERS
from effattn_jax.layers.lower_bound import bound_logits
from effattn_jax.models.block import Block


def bounds_name(name: str, kind: str, options: Mapping[str, Any]) -> str | None:
    """The name itself where the mixer has bounds that are trained; else None."""
    trained = hasattr(MIXERS.get(kind), "with_bounds") and options.get("lower_bound") is None
    return name if trained else None


def common_bounds(blocks: Iterable[Block], layer_count: int) -> dict[str, nnx.Param]:
    """By name the logits [L, E], a row for each of all layers of the stack."""
    return {
        block.bounds_name: bound_logits(layer_count, block.mixer.bound_channels)
        for block in blocks
        if block.bounds_name is not None
    }
