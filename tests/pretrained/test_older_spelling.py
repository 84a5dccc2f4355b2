"""config.json as transformers wrote it before version 5, and as most repositories of the hub still have it."""

import shutil

import numpy as np
import pytest

from effattn_jax.pretrained import load
from tests.pretrained.fixture import FOLDER, fixture
from tests.pretrained.test_families import MODELS, forward, tolerance

OLDER = [name for name in MODELS if (FOLDER / name / "config_v4.json").exists()]


@pytest.mark.slow
@pytest.mark.parametrize("name", OLDER)
def test_the_older_spelling(name, tmp_path):
    given = fixture(name)
    shutil.copy(given.path / "model.safetensors", tmp_path)
    shutil.copy(given.path / "config_v4.json", tmp_path / "config.json")
    model = load(tmp_path)
    np.testing.assert_allclose(forward(model, given.io["input_ids"]), given.io["logits"], atol=tolerance(name), rtol=0)
