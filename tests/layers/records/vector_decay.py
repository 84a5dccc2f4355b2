from effattn_jax.layers import HGRN2, RWKV5, RWKV6, GatedLinearAttention, RWKV5ChannelMix, RWKV6ChannelMix
from tests.layers.records.record import Record

# The norms' eps are such that a difference over 1e-3 is a slope: a small head under a small eps bends sharply.
GLA = {"heads": 2, "gate_rank": 3, "gate_temperature": 4.0, "norm_eps": 0.1}
PLACE = {"layer_index": 1, "layer_count": 3}
RWKV = {"head_dim": 4, "norm_eps": 0.1}

RECORDS = {
    "gla": Record(GatedLinearAttention, GLA, slow=True),
    "gla_groups_conv": Record(
        GatedLinearAttention,
        GLA | {"heads": 4, "kv_heads": 2, "expand_k": 1.0, "expand_v": 0.5, "conv_width": 4, "gate_floor": -0.3},
    ),
    "gla_no_gate": Record(GatedLinearAttention, GLA | {"output_gate": False, "conv_width": 3}, slow=True),
    "hgrn2": Record(HGRN2, {"head_dim": 8} | PLACE),
    "hgrn2_first": Record(HGRN2, {"head_dim": 4}, slow=True, idle=("bound_logits",)),
    "hgrn2_bound": Record(HGRN2, {"head_dim": 8, "lower_bound": 0.6}, slow=True),
    "rwkv5": Record(RWKV5, RWKV),
    "rwkv6": Record(RWKV6, RWKV | {"mix_rank": 3, "decay_rank": 5}),
    "rwkv5_channel_mix": Record(RWKV5ChannelMix, {"hidden_dim": 24}, slow=True),
    "rwkv6_channel_mix": Record(RWKV6ChannelMix, {"hidden_dim": 24}),
}
