"""Memories of fixed size, as pure functions: `(inputs, initial_state) -> (out, final_state)`."""

from effattn_jax.linear.delta_rule import delta_rule
from effattn_jax.linear.diagonal_scan import diagonal_scan
from effattn_jax.linear.dplr import dplr
from effattn_jax.linear.favor import FavorState, draw_omega, favor_attention
from effattn_jax.linear.gated_slot_attention import SlotState, gated_slot_attention
from effattn_jax.linear.linear_attention import linear_attention
from effattn_jax.linear.log_linear import LogLinearState, log_linear_attention
from effattn_jax.linear.mamba3 import Mamba3Memory, mamba3
from effattn_jax.linear.mesa import MesaState, mesa
from effattn_jax.linear.rg_lru import rg_lru
from effattn_jax.linear.rwkv4 import RWKV4Memory, rwkv4
from effattn_jax.linear.scalar_decay import scalar_decay
from effattn_jax.linear.selective_scan import selective_scan
from effattn_jax.linear.titans_memory import TitansState, titans_memory
from effattn_jax.linear.ttt_forms import TTTState
from effattn_jax.linear.ttt_linear import ttt_linear
from effattn_jax.linear.ttt_mlp import ttt_mlp
from effattn_jax.linear.vector_decay import vector_decay

__all__ = [
    "FavorState",
    "LogLinearState",
    "Mamba3Memory",
    "MesaState",
    "RWKV4Memory",
    "SlotState",
    "TTTState",
    "TitansState",
    "delta_rule",
    "diagonal_scan",
    "dplr",
    "draw_omega",
    "favor_attention",
    "gated_slot_attention",
    "linear_attention",
    "log_linear_attention",
    "mamba3",
    "mesa",
    "rg_lru",
    "rwkv4",
    "scalar_decay",
    "selective_scan",
    "titans_memory",
    "ttt_linear",
    "ttt_mlp",
    "vector_decay",
]
