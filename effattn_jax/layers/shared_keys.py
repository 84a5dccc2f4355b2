"""Keys and values of one layer that layers above read instead of their own (Brandon et al. 2024, arXiv:2405.12981)."""

from typing import NamedTuple

from effattn_jax.sparse.readable import Readable
from effattn_jax.typing import Positions


class SharedKeys(NamedTuple):
    """What a layer hands up. A mixer that takes part has, beside `__call__`,
    `with_keys(x, state, given, *, segment_ids, positions) -> (y, state, what it read)`."""

    readable: Readable  # keys are rotated
    positions: Positions  # that rotate the queries
