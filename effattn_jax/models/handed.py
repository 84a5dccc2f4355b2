"""What blocks hand up to those above them, and a stack to its blocks, beside the residual stream."""

from typing import NamedTuple

from effattn_jax.layers.first_value import FirstValue
from effattn_jax.layers.shared_keys import SharedKeys
from effattn_jax.typing import Array, Float


class Handed(NamedTuple):
    """Into a block: the first layer's values, the keys that it reads, and the lower bounds of the stack. Out of it:
    these values, and the keys it gives."""

    first: FirstValue | None = None
    keys: SharedKeys | None = None
    bounds: Float[Array, "L E"] | None = None
