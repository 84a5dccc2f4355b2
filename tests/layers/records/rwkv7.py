from effattn_jax.layers import RWKV7, RWKV7ChannelMix
from tests.layers.records.record import Record

RWKV = {"head_dim": 4, "decay_rank": 3, "rate_rank": 3, "value_rank": 2, "gate_rank": 5}
FIRST_LAYER = ("v_mix.",)  # mixes values of the first layer into those of the layers above it

RECORDS = {
    "rwkv7": Record(RWKV7, RWKV, idle=FIRST_LAYER),
    "rwkv7_channel_mix": Record(RWKV7ChannelMix, {"hidden_dim": 24}),
}
