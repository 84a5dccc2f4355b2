"""Presets: as many parameters as their authors' files have."""

import json
import math

import pytest
from flax import nnx

from effattn_jax.models.blueprint import blueprint
from effattn_jax.pretrained import from_config
from effattn_jax.pretrained.description import describe_config
from effattn_jax.pretrained.presets import names, preset
from effattn_jax.pretrained.rules import rules
from tests.pretrained.fixture import FOLDER

EXACT = {
    "falcon-mamba-7b": 7_272_665_088,
    "mistral-7b-v0.1": 7_241_732_096,
    "gpt-oss-20b": 20_914_757_184,
    "jamba-v0.1": 51_570_323_328,
    "recurrentgemma-2b": 2_682_862_080,
    "minimax-text-01": 456_089_655_296,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472 - 416_866_032 - 2_950_272,  # without the encoder of images and its projection
    "gemma-3-27b": 27_432_406_640 - 416_866_032 - 6_194_304,
    "gpt-oss-120b": 116_829_156_672,
    "kimi-linear-48b-a3b": 49_122_675_072 + 26 * 256,  # the corrections of 26 routers are buffers there
    "mamba-130m": 129_135_360,
    "mamba-2.8b": 2_768_345_600,
    "mamba-codestral-7b": 7_285_403_648,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "rwkv7-world-0.4b": 450_834_432 - 2 * 32 * 1024 - 1024,  # what the first layer's values would be mixed by
}
BY_HAND = {  # embedding, head and last norm; then of a block norms, projections, gates or convolutions, and SwiGLU
    "gla-1.3b": 2 * 32_000 * 2048
    + 2048
    + 24 * (2 * 2048 + 512 + 2048 * (2 * 1024 + 3 * 2048) + 2048 * 16 + 16 * 1024 + 1024 + 3 * 2048 * 5632),
    "delta_net-340m": 2 * 32_000 * 1024
    + 1024
    + 24 * (2 * 1024 + 128 + 4 * 1024 * 1024 + 8 * 1024 + 3 * 4 * 1024 + 3 * 1024 * 2816),
}
ROUNDED = {  # to the digits that are published
    "gemma-3-12b": (11.8e9, 0.05e9),
    "mamba-370m": (370e6, 5e6),
    "mamba-790m": (790e6, 5e6),
    "mamba-1.4b": (1.4e9, 0.05e9),
    "minicpm4-8b": (8.19e9, 0.005e9),
    "recurrentgemma-9b": (8.58e9, 0.005e9),
    "rwkv5-world-0.4b": (0.46e9, 0.005e9),
    "rwkv5-world-1.5b": (1.5e9, 0.1e9),
    "rwkv5-world-3b": (3e9, 0.1e9),
    "rwkv5-world-7b": (7.5e9, 0.05e9),
    "rwkv6-world-1.6b": (1.6e9, 0.05e9),
    "rwkv6-world-3b": (3.1e9, 0.05e9),
    "rwkv7-world-0.1b": (0.19e9, 0.005e9),
    "rwkv7-world-1.5b": (1.5e9, 0.05e9),
    "rwkv7-world-2.9b": (2.9e9, 0.05e9),
}


def parameters(name):
    config = preset(name)
    plan = blueprint(lambda: from_config(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(rule.shape) for rule in rules(config, plan).values())


@pytest.mark.parametrize("name", [*EXACT, *BY_HAND])
@pytest.mark.quick_cases(4)
def test_parameters_to_the_digit(name):
    assert parameters(name) == (EXACT | BY_HAND)[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDED)
def test_parameters_about(name):
    want, error = ROUNDED[name]
    assert abs(parameters(name) - want) < error


def test_every_preset_has_a_count():
    assert sorted([*EXACT, *BY_HAND, *ROUNDED]) == list(names())


@pytest.mark.parametrize(("name", "billions"), [("gpt-oss-20b", "3.61"), ("gpt-oss-120b", "5.13")])
@pytest.mark.quick_cases(1)
def test_active_parameters(name, billions):
    assert f"{describe_config(preset(name), [1]).active_parameters / 1e9:.2f}" == billions


@pytest.mark.slow
def test_layers_of_hybrids():
    layers = {name: dict(describe_config(preset(name), [1]).layers) for name in ("jamba-v0.1", "gemma-3-27b")}
    assert layers["gemma-3-27b"] == {
        "attention, window 1,024 + gated gelu_tanh": 52,
        "attention + gated gelu_tanh": 10,
    }
    assert layers["jamba-v0.1"] == {
        "mamba + swiglu": 12,
        "mamba + 2 of 16 experts": 16,
        "attention + swiglu": 4,
    }


def test_a_name_that_is_not_there():
    with pytest.raises(ValueError, match="preset: got 'gpt-5'; needs one of delta_net-340m, falcon-mamba-7b, "):
        preset("gpt-5")


def test_presets_name_the_class_that_opens_them():
    """As the fixtures of their model type do: what runs models by that name asks for it."""
    classes = {}
    for path in FOLDER.glob("*/config.json"):
        config = json.loads(path.read_text())
        classes |= {config.get("model_type"): config.get("architectures")}
    typed = [config for config in map(preset, names()) if "model_type" in config]
    known = [config for config in typed if config["model_type"] in classes]
    assert {config["model_type"] for config in typed} - set(classes) == {"minimax_text_01"}
    assert [config["architectures"] for config in known] == [classes[config["model_type"]] for config in known]
