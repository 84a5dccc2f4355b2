"""Memories of fixed size, as pure functions: `(inputs, initial_state) -> (out, final_state)`."""

from effattn_jax.linear.delta_rule import delta_rule
from effattn_jax.linear.dplr import dplr
from effattn_jax.linear.scalar_decay import scalar_decay

__all__ = ["delta_rule", "dplr", "scalar_decay"]
