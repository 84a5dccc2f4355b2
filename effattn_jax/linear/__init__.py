"""Memories of fixed size, as pure functions: `(inputs, initial_state) -> (out, final_state)`."""

from effattn_jax.linear.delta_rule import delta_rule
from effattn_jax.linear.dplr import dplr
from effattn_jax.linear.favor import FavorState, draw_omega, favor_attention
from effattn_jax.linear.linear_attention import linear_attention
from effattn_jax.linear.scalar_decay import scalar_decay
from effattn_jax.linear.titans_memory import TitansState, titans_memory
from effattn_jax.linear.ttt_forms import TTTState
from effattn_jax.linear.ttt_linear import ttt_linear
from effattn_jax.linear.ttt_mlp import ttt_mlp
from effattn_jax.linear.vector_decay import vector_decay

__all__ = [
    "FavorState",
    "TTTState",
    "TitansState",
    "delta_rule",
    "dplr",
    "draw_omega",
    "favor_attention",
    "linear_attention",
    "scalar_decay",
    "titans_memory",
    "ttt_linear",
    "ttt_mlp",
    "vector_decay",
]
