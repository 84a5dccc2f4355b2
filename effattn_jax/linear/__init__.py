"""Memories of fixed size, as pure functions: `(inputs, initial_state) -> (out, final_state)`."""

from effattn_jax.linear.scalar_decay import scalar_decay

__all__ = ["scalar_decay"]
