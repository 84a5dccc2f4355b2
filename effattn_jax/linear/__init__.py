"""Memories of fixed size, as pure functions: `(inputs, initial_state) -> (out, final_state)`."""

from effattn_jax.linear.delta_rule import delta_rule
from effattn_jax.linear.dplr import dplr
from effattn_jax.linear.favor import FavorState, draw_omega, favor_attention
from effattn_jax.linear.linear_attention import linear_attention
from effattn_jax.linear.scalar_decay import scalar_decay
from effattn_jax.linear.vector_decay import vector_decay

__all__ = [
    "FavorState",
    "delta_rule",
    "dplr",
    "draw_omega",
    "favor_attention",
    "linear_attention",
    "scalar_decay",
    "vector_decay",
]
