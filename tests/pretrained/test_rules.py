"""A family's table accounts for every parameter, and of a stacked one for every repetition."""

import pytest
from flax import nnx

from effattn_jax.models.blueprint import blueprint
from effattn_jax.pretrained import families, from_config
from effattn_jax.pretrained.families import minimax, mistral
from effattn_jax.pretrained.rules import rules
from tests.pretrained.fixture import fixture


@pytest.fixture
def resolved(monkeypatch):
    """Rules of a fixture's model when the table of its family is another."""

    def resolve(name, family, **changed):
        config = fixture(name).config
        monkeypatch.setitem(families.FAMILIES, config["model_type"], family._replace(**changed))
        return rules(config, blueprint(lambda: from_config(config, rngs=nnx.Rngs(0))))

    return resolve


def inside_without(family, *left_out):
    """The table without (block, parameter) of `left_out`."""
    return lambda config, block: [
        entry
        for entry in family.inside(config, block)
        if not any((block, name) in left_out for name in entry.parameters)
    ]


def test_a_parameter_without_a_tensor(resolved):
    layers = fixture("mistral_swa").config["num_hidden_layers"]
    inside = inside_without(mistral.FAMILY, *((block, "mixer.k_proj.kernel") for block in range(layers)))
    with pytest.raises(ValueError, match=r"table of 'mistral': got no tensor for units\.blocks\.0\.mixer\.k_proj\."):
        resolved("mistral_swa", mistral.FAMILY, inside=inside)


def test_all_repetitions_without_a_tensor_are_listed(resolved):
    inside = inside_without(mistral.FAMILY, (1, "mixer.k_proj.kernel"), (2, "mlp.up.kernel"))
    with pytest.raises(ValueError, match="table of 'mistral'") as error:
        resolved("mistral_swa", mistral.FAMILY, inside=inside)
    assert "no tensor for units.blocks.0.mixer.k_proj.kernel[1], units.blocks.0.mlp.up.kernel[2];" in str(error.value)


def test_what_the_family_calls_unused_needs_no_tensor(resolved):
    inside = inside_without(mistral.FAMILY, (1, "mixer.k_proj.kernel"))
    unused = lambda config, block: ["mixer.k_proj.kernel"] if block == 1 else []  # noqa: E731
    found = resolved("mistral_swa", mistral.FAMILY, inside=inside, unused=unused)
    assert "model.layers.1.self_attn.k_proj.weight" not in found
    assert "model.layers.2.self_attn.k_proj.weight" in found


def test_a_name_that_no_parameter_has(resolved):
    with pytest.raises(KeyError, match=r"units\.blocks\.0\.mixer\.j_proj"):
        resolved("mistral_swa", mistral.FAMILY, unused=lambda config, block: ["mixer.j_proj"])


def test_a_buffer_needs_no_tensor(resolved):
    assert not any("slope" in name for name in resolved("minimax_text01", minimax.FAMILY))


def test_an_expert_without_a_tensor(resolved):
    """Repetitions and experts are the two leading axes."""

    def inside(config, block):
        return [e for e in minimax.FAMILY.inside(config, block) if not (block == 1 and e.at == (2,))]

    with pytest.raises(ValueError, match=r"no tensor for [\w.]+\[(\d, )?2\], ") as error:
        resolved("minimax_text01", minimax.FAMILY, inside=inside)
    assert str(error.value).count("[") == 3
