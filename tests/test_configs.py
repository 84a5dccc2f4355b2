"""Every config builds: the sizes in the names are the sizes of the models, and the fields are those of `base`."""

import importlib
import math

import pytest
from flax import nnx

from configs import character_ai_350m
from configs.common import base
from effattn_jax.models import sizes
from effattn_jax.models.blueprint import blueprint
from effattn_jax.training.setup import model_maker


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("quickstart", 1.5e6),
        ("hybrid_125m", 125e6),
        ("hybrid_350m", 350e6),
        ("character_ai_350m", 350e6),
        ("hybrid_1b3", 1.3e9),
    ],
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


def test_the_cache_of_character_ai():
    """Nine layers of 24 with one key head in int8, eight of them over a window: 268 bytes a token, scales included."""
    length = 32_768
    model = nnx.eval_shape(model_maker(character_ai_350m.get_config(), 258))
    assert sizes(model, length).cache_bytes == 268 * (length + 8 * 1024) + 9 * (4 + 4)
    assert sum(times for times, _ in model.parts()) == 24
