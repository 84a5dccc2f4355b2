"""Heads of queries and values that together have a multiple of the channels of the residual stream."""

from effattn_jax import checks


def head_dim(name: str, factor: float, dim: int, heads: int) -> int:
    """Channels of each of `heads` heads that have factor * dim of them together; `name` is the user's of the factor.

    Raises:
      ValueError: they cannot be equal heads.
    """
    if factor <= 0 or not (dim * factor / heads).is_integer():
        checks.fail(name, factor, f"a factor that makes dim = {dim} channels of {heads} equal heads")
    return int(dim * factor / heads)
