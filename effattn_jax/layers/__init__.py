"""Flax NNX layers. A mixer keeps one contract: `layer(x, state=None, *, segment_ids=None, positions=None)` returns
`(y, new_state)`, and `layer.init_state(batch_size, max_length)` the state before the first token.

State goes in and comes out: without a state the layer sees a whole sequence (training) and returns None for it; with
one it continues from what the state has seen, be it many tokens (prefill) or one (decoding). A forward pass changes
nothing in the module.

In Linen a layer is `nnx.bridge.to_linen(Layer, *args, **options)`. Let `metadata_fn` turn a parameter's logical axes
into Linen's box; `nn.scan` then adds its axis by the name in `metadata_params={nn.PARTITION_NAME: "layers"}`.

    boxed = lambda p: nn.LogicallyPartitioned(p.get_value(), p.get_metadata()["axes"])
    y, state = nnx.bridge.to_linen(Mamba2, dim, state_dim=64, metadata_fn=boxed)(x, state)
"""

from effattn_jax.layers.attention import Attention
from effattn_jax.layers.causal_convolution import CausalConvolution, CausalConvolutionState
from effattn_jax.layers.comba import Comba
from effattn_jax.layers.delta_layer import DeltaState
from effattn_jax.layers.delta_net import DeltaNet
from effattn_jax.layers.dsa import DSA
from effattn_jax.layers.fast_weight import FastWeight, FastWeightState
from effattn_jax.layers.fox import ForgettingAttention, ForgettingState
from effattn_jax.layers.gated_delta_net import GatedDeltaNet
from effattn_jax.layers.gated_delta_net2 import GatedDeltaNet2
from effattn_jax.layers.gated_delta_product import GatedDeltaProduct
from effattn_jax.layers.gated_mlp import GatedMLP, SwiGLU
from effattn_jax.layers.gated_slot_attention import GatedSlotAttention, GSAState
from effattn_jax.layers.gla import GatedLinearAttention, GLAState
from effattn_jax.layers.hgrn import HGRN, HGRNState
from effattn_jax.layers.hgrn2 import HGRN2, HGRN2State
from effattn_jax.layers.infllm2 import InfLLM2
from effattn_jax.layers.kda import KimiDeltaAttention
from effattn_jax.layers.l2_norm import l2_norm
from effattn_jax.layers.layer_norm import LayerNorm
from effattn_jax.layers.lightning import LightningAttention, LightningState
from effattn_jax.layers.linear_attention import LinearAttention, LinearAttentionState
from effattn_jax.layers.log_linear import LogLinear, LogLinearLayerState
from effattn_jax.layers.low_rank import LowRank
from effattn_jax.layers.mamba import Mamba, MambaState
from effattn_jax.layers.mamba2 import Mamba2, Mamba2State
from effattn_jax.layers.mamba3 import Mamba3, Mamba3State
from effattn_jax.layers.mesa_net import MesaNet, MesaNetState
from effattn_jax.layers.mla import LatentAttention
from effattn_jax.layers.moba import MoBA
from effattn_jax.layers.moe import MoE
from effattn_jax.layers.neural_memory import MemoryState
from effattn_jax.layers.nsa import NSA
from effattn_jax.layers.nsa_shared import SharedNSA
from effattn_jax.layers.path_attention import PathAttention, PathState
from effattn_jax.layers.performer import Performer, PerformerState
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.retention import MultiScaleRetention, RetentionState
from effattn_jax.layers.rg_lru import RGLRU, RGLRUState
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.layers.rope import rope
from effattn_jax.layers.routed import RoutedState
from effattn_jax.layers.rwkv4 import RWKV4, RWKV4State
from effattn_jax.layers.rwkv5 import RWKV5
from effattn_jax.layers.rwkv6 import RWKV6
from effattn_jax.layers.rwkv7 import RWKV7, RWKV7State
from effattn_jax.layers.rwkv7_channel_mix import ChannelMixState, RWKV7ChannelMix
from effattn_jax.layers.rwkv_channel_mix import RWKV5ChannelMix, RWKV6ChannelMix
from effattn_jax.layers.rwkv_time_mix import RWKVState
from effattn_jax.layers.short_convolution import ShortConvolution
from effattn_jax.layers.titans import Titans
from effattn_jax.layers.titans_mac import MACState, TitansMAC
from effattn_jax.layers.titans_mag import MAGState, TitansMAG
from effattn_jax.layers.titans_mal import MALState, TitansMAL
from effattn_jax.layers.token_shift import token_shift
from effattn_jax.layers.ttt import TTTLayerState
from effattn_jax.layers.ttt_linear import TTTLinear
from effattn_jax.layers.ttt_mlp import TTTMLP

MIXERS = {
    "attention": Attention,
    "causal_convolution": CausalConvolution,
    "comba": Comba,
    "delta_net": DeltaNet,
    "dsa": DSA,
    "fast_weight": FastWeight,
    "fox": ForgettingAttention,
    "gated_delta_net": GatedDeltaNet,
    "gated_delta_net2": GatedDeltaNet2,
    "gated_delta_product": GatedDeltaProduct,
    "gla": GatedLinearAttention,
    "gsa": GatedSlotAttention,
    "hgrn": HGRN,
    "hgrn2": HGRN2,
    "infllm2": InfLLM2,
    "kda": KimiDeltaAttention,
    "lightning": LightningAttention,
    "linear_attention": LinearAttention,
    "log_linear": LogLinear,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "mesa_net": MesaNet,
    "mla": LatentAttention,
    "moba": MoBA,
    "nsa": NSA,
    "nsa_shared": SharedNSA,
    "path": PathAttention,
    "performer": Performer,
    "retention": MultiScaleRetention,
    "rg_lru": RGLRU,
    "rwkv4": RWKV4,
    "rwkv5": RWKV5,
    "rwkv6": RWKV6,
    "rwkv7": RWKV7,
    "titans": Titans,
    "titans_mac": TitansMAC,
    "titans_mag": TitansMAG,
    "titans_mal": TitansMAL,
    "ttt_linear": TTTLinear,
    "ttt_mlp": TTTMLP,
}
"""The mixers a model pattern can name."""

FEED_FORWARDS = {
    "swiglu": GatedMLP,
    "moe": MoE,
    "rwkv7_channel_mix": RWKV7ChannelMix,
    "rwkv5_channel_mix": RWKV5ChannelMix,
    "rwkv6_channel_mix": RWKV6ChannelMix,
}
"""The feed-forward layers a model can name: `layer(x) -> y`, or with a state, like a mixer, where they look back."""

__all__ = [
    "DSA",
    "FEED_FORWARDS",
    "HGRN",
    "HGRN2",
    "MIXERS",
    "NSA",
    "RGLRU",
    "RWKV4",
    "RWKV5",
    "RWKV6",
    "RWKV7",
    "TTTMLP",
    "Attention",
    "CausalConvolution",
    "CausalConvolutionState",
    "ChannelMixState",
    "Comba",
    "DeltaNet",
    "DeltaState",
    "FastWeight",
    "FastWeightState",
    "ForgettingAttention",
    "ForgettingState",
    "GLAState",
    "GSAState",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "GatedDeltaProduct",
    "GatedLinearAttention",
    "GatedMLP",
    "GatedSlotAttention",
    "HGRN2State",
    "HGRNState",
    "InfLLM2",
    "KimiDeltaAttention",
    "LatentAttention",
    "LayerNorm",
    "LightningAttention",
    "LightningState",
    "LinearAttention",
    "LinearAttentionState",
    "LogLinear",
    "LogLinearLayerState",
    "LowRank",
    "MACState",
    "MAGState",
    "MALState",
    "Mamba",
    "Mamba2",
    "Mamba2State",
    "Mamba3",
    "Mamba3State",
    "MambaState",
    "MemoryState",
    "MesaNet",
    "MesaNetState",
    "MoBA",
    "MoE",
    "MultiScaleRetention",
    "PathAttention",
    "PathState",
    "Performer",
    "PerformerState",
    "Projection",
    "RGLRUState",
    "RMSNorm",
    "RWKV4State",
    "RWKV5ChannelMix",
    "RWKV6ChannelMix",
    "RWKV7ChannelMix",
    "RWKV7State",
    "RWKVState",
    "RetentionState",
    "RoutedState",
    "SharedNSA",
    "ShortConvolution",
    "SwiGLU",
    "TTTLayerState",
    "TTTLinear",
    "Titans",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "l2_norm",
    "rope",
    "token_shift",
]
