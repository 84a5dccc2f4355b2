"""Test-time training in mini-batches of 8, which rows and documents of the tests end inside."""

from effattn_jax.layers import TTTMLP, CausalConvolution, TTTLinear
from tests.layers.records.record import Record

TTT = {"head_dim": 8, "mini_batch": 8}

RECORDS = {
    "ttt_linear": Record(TTTLinear, TTT | {"backbone": "mamba"}),
    "ttt_mlp": Record(TTTMLP, TTT | {"expand": 2}),
    "causal_convolution": Record(CausalConvolution, {}, slow=True),
    "ttt_linear_transformer": Record(TTTLinear, TTT | {"mini_batch": 3}, slow=True),
    "ttt_mlp_mamba": Record(TTTMLP, TTT | {"backbone": "mamba", "conv_width": 3}, slow=True),
}
