"""What weight decay pulls on."""

import pytest
from flax import nnx

from effattn_jax.models import LanguageModel
from effattn_jax.models.blueprint import blueprint
from effattn_jax.training.step import decay_mask

CASES = {  # mixer -> options, feed-forward layer, names of what stays though it has two axes or more
    "mamba": ({}, "swiglu", {"A_log", "taps"}),
    "rg_lru": ({"heads": 2}, "swiglu", {"bias", "taps"}),
    "rwkv6": ({"head_dim": 8}, "rwkv6_channel_mix", set()),
    "ttt_linear": ({"head_dim": 8}, "swiglu", {"W", "b", "ln_scale", "ln_bias"}),
    "attention": ({"heads": 2, "qk_norm": True, "bias": True}, "moe", set()),
}


@pytest.mark.parametrize("mixer", CASES)
def test_matrices_decay_and_nothing_else(mixer):
    options, mlp, stays = CASES[mixer]
    sizes = {"vocab_size": 20, "dim": 16, "mlp_dim": 24, "repeats": 2}
    mlp_options = {"experts": 4, "top_k": 2} if mlp == "moe" else {}
    plan = blueprint(
        lambda: LanguageModel(
            **sizes,
            pattern=(mixer,),
            mixers={mixer: options},
            mlp=mlp,
            mlp_options=mlp_options,
            rngs=nnx.Rngs(0),
        )
    )
    wide = {name for name, axes in plan.axes.items() if len([axis for axis in axes if axis]) >= 2}
    decays = {name for name, pulled in decay_mask(plan).items() if pulled}
    assert decays < set(plan.names)
    assert decays <= wide
    assert {name.split(".")[-1] for name in wide - decays} == stays
    assert {name.split(".")[-1] for name in decays} == {"embedding", "kernel"} | (
        {"mix_up"} if mixer == "rwkv6" else set()
    )
