"""Configs of TTT that no published model has."""

import pytest
from flax import nnx

from effattn_jax.pretrained import from_config
from tests.pretrained.fixture import fixture


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"share_qk": True}, "config.json: got share_qk True, use_gate False; needs both"),
        ({"use_gate": True}, "config.json: got share_qk False, use_gate True; needs both"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'; needs 'silu'"),
        ({"ttt_layer_type": "conv"}, "ttt_layer_type: got 'conv'; needs linear or mlp"),
    ],
)
def test_refused_options(changed, message):
    with pytest.raises(ValueError, match=message):
        from_config(fixture("ttt_linear").config | changed, rngs=nnx.Rngs(0))


def test_a_convolution_alone():
    """`pre_conv` does not depend on the backbone: two blocks for each layer of the file."""
    model = nnx.eval_shape(lambda: from_config(fixture("ttt_linear").config | {"pre_conv": True}, rngs=nnx.Rngs(0)))
    assert [type(block.mixer).__name__ for block in model.units.blocks] == ["CausalConvolution", "TTTLinear"]
    assert model.repeats == 3
