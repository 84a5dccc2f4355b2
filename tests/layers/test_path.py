"""PaTH against the public implementation's small model."""

import pytest

from tests.layers.golden import assert_fla_model


def options(config, layer):
    return {"heads": config["num_heads"], "conv_width": 3}


def weights(t, config, layer):
    return {
        "q_proj.kernel": t["q_proj.weight"].T,
        "k_proj.kernel": t["k_proj.weight"].T,
        "v_proj.kernel": t["v_proj.weight"].T,
        "w_proj.down.kernel": t["w_proj.0.weight"].T,
        "w_proj.up.kernel": t["w_proj.1.weight"].T,
        "w_conv.taps": t["w_conv1d.weight"][:, 0].T,
        "beta_proj.kernel": t["bt_proj.weight"].T,
        "beta_proj.bias": t["bt_proj.bias"],
        "out_proj.kernel": t["o_proj.weight"].T,
    }


@pytest.mark.slow
def test_fla_path_attn():
    """Past its first block of 64 tokens the reference rounds what it carries on: 1e-3 is the fixture's own limit."""
    assert_fla_model("fla_path_attn", "path", options, weights, long_atol=1e-3)
