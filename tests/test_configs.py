"""Every config builds: the sizes in the names are the sizes of the models, and the fields are those of `base`."""

import importlib
import math

import pytest

from configs.common import base
from effattn_jax.models.blueprint import blueprint
from effattn_jax.training.setup import model_maker


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("quickstart", 1.5e6), ("hybrid_125m", 125e6), ("hybrid_350m", 350e6), ("hybrid_1b3", 1.3e9)],
)
def test_config_builds_a_model_of_its_size(name, parameters):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    shapes = blueprint(model_maker(config, 258)).shapes
    assert sum(math.prod(x.shape) for x in shapes.values()) == pytest.approx(parameters, rel=0.06)
    assert "python -m experiments.train" in module.__doc__
    for part, fields in base().items():
        assert part in config
        if part not in ("seed", "model"):
            assert fields.keys() == config[part].keys()
