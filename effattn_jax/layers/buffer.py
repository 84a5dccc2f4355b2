"""Numbers of a layer that travel with its parameters but are not trained."""

import jax
from flax import nnx

from effattn_jax.typing import Array


class Buffer(nnx.Param):
    """Saved, loaded and stacked like a parameter; read it by `constant`, which gives it no gradient."""


def constant(buffer: Buffer) -> Array:
    return jax.lax.stop_gradient(buffer[...])
