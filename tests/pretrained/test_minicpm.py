"""MiniCPM-4 with a `sparse_config`: where its attention reads everything it is the published model, else it is not."""

import json
import shutil

import numpy as np
import pytest

from effattn_jax.layers import InfLLM2
from effattn_jax.pretrained import load
from tests.pretrained.fixture import fixture
from tests.pretrained.test_families import TOLERANCE, forward

SIZES = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "init_blocks": 1, "window_size": 4, "use_nope": False}


def sparse(path, **given):
    own = fixture("minicpm4_longrope")
    shutil.copy(own.path / "model.safetensors", path)
    (path / "config.json").write_text(json.dumps(own.config | {"sparse_config": SIZES | given}))
    return load(path), own.io


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("budget", [{"topk": 2, "dense_len": 8192}, {"topk": 16, "dense_len": -1}])
def test_short_rows_and_large_budgets_are_read_whole(budget, tmp_path):
    model, io = sparse(tmp_path, **budget)
    assert isinstance(model.units.blocks[0].mixer, InfLLM2)
    np.testing.assert_allclose(forward(model, io["input_ids"]), io["logits"], atol=TOLERANCE, rtol=0)


def test_a_small_budget_reads_less(tmp_path):
    """Three blocks of four tokens: the same up to there, far from it later."""
    model, io = sparse(tmp_path, topk=2, dense_len=-1)
    error = np.abs(forward(model, io["input_ids"]) - io["logits"]).max(axis=(0, 2))
    assert (error[:12] < TOLERANCE).all()
    assert (error[24:] > 0.1).all()


def test_blocks_are_chosen_by_rotated_keys(tmp_path):
    with pytest.raises(ValueError, match=r"sparse_config.use_nope: got True; needs false"):
        sparse(tmp_path, topk=2, use_nope=True)
