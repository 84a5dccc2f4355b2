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
from effattn_jax.layers.l2_norm import l2_norm
from effattn_jax.layers.layer_norm import LayerNorm
from effattn_jax.layers.low_rank import LowRank
from effattn_jax.layers.mamba2 import Mamba2, Mamba2State
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.layers.rope import rope
from effattn_jax.layers.short_convolution import ShortConvolution
from effattn_jax.layers.swiglu import SwiGLU
from effattn_jax.layers.token_shift import token_shift

MIXERS = {"attention": Attention, "mamba2": Mamba2}
"""The mixers a model pattern can name."""

FEED_FORWARDS = {"swiglu": SwiGLU}
"""The feed-forward layers a model can name: `layer(x) -> y`, or with a state, like a mixer, where they look back."""

__all__ = [
    "FEED_FORWARDS",
    "MIXERS",
    "Attention",
    "LayerNorm",
    "LowRank",
    "Mamba2",
    "Mamba2State",
    "Projection",
    "RMSNorm",
    "ShortConvolution",
    "SwiGLU",
    "l2_norm",
    "rope",
    "token_shift",
]
