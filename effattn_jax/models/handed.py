"""What blocks hand up to those above them, beside the residual stream."""

from typing import NamedTuple

from effattn_jax.layers.first_value import FirstValue
from effattn_jax.layers.shared_keys import SharedKeys


class Handed(NamedTuple):
    """Into a block: the first layer's values, and the keys that it reads. Out of it: these, and the keys it gives."""

    first: FirstValue | None = None
    keys: SharedKeys | None = None
