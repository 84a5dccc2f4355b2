"""One line that names what does not fit."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import Attention, Mamba2, RMSNorm, ShortConvolution
from effattn_jax.models import Block
from tests.layers.catalogue import BATCH, inputs, layer


def attention(**options):
    return lambda rngs: Attention(16, **{"heads": 4, **options}, rngs=rngs)


def mamba2(**options):
    return lambda rngs: Mamba2(16, **{"head_dim": 8, "state_dim": 4, **options}, rngs=rngs)


def block(mixer, **options):
    return lambda rngs: Block(16, mixer, options, mlp_dim=0, rngs=rngs)


WRONG = {
    "window: got 0": attention(window=0),
    "window: got -3": attention(window=-3),
    "heads: got 0": attention(heads=0),
    "heads: got 3": attention(heads=3),
    "kv_heads: got 3": attention(kv_heads=3),
    "kv_heads: got 0": attention(kv_heads=0),
    "kv_heads: got 8": attention(kv_heads=8),
    "rope_fraction: got 1.0 of head_dim 5": attention(head_dim=5),
    "rope_fraction: got 0.0": attention(rope_fraction=0.0),
    "rope_fraction: got 1.5": attention(rope_fraction=1.5),
    "rope_fraction: got 0.1": attention(rope_fraction=0.1),
    "head_dim: got 5": mamba2(head_dim=5),
    "groups: got 3": mamba2(groups=3),
    "groups: got 0": mamba2(groups=0),
    "width: got 0": mamba2(conv_width=0),
    "width: got -1": lambda rngs: ShortConvolution(4, -1, rngs=rngs),
    "groups: got 5": lambda rngs: RMSNorm(16, groups=5),
    "mixer: got 'mamba9'": block("mamba9"),
    "mixer 'attention': ": block("attention", heads=4, windows=3),
    "mixer 'mamba2': ": block("mamba2", heads=4),
}


@pytest.mark.parametrize("message", WRONG)
def test_options(message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        nnx.eval_shape(lambda: WRONG[message](nnx.Rngs(0)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mamba2", "attention", "attention_window"])
@pytest.mark.parametrize("wrong", ["shape", "dtype", "order"])
def test_segment_ids(name, wrong):
    ids = {"shape": np.zeros((BATCH, 3), int), "dtype": np.zeros((BATCH, 4)), "order": np.tile([0, 2, 1, 1], (2, 1))}
    module = layer(name)
    for state in (None, module.init_state(BATCH, 8)):
        with pytest.raises(ValueError, match="segment_ids") as error:
            jax.eval_shape(lambda x, state: module(x, state, segment_ids=ids[wrong]), inputs(4), state)
        assert "\n" not in str(error.value)
