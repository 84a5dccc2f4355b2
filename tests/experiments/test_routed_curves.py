"""The runs of `experiments.routed_curves` differ by their mixer alone, and dense lists are block attention."""

import json
import math

import pytest

from configs import routed_125m, routed_small
from effattn_jax.models.blueprint import blueprint
from effattn_jax.training.setup import model_maker
from experiments import routed_curves
from experiments.routed_curves import configured, smoothed


@pytest.mark.parametrize("full", [False, True])
def test_runs_differ_by_their_mixer_alone(full):
    configs = [
        configured(name, full=full, steps=7, seed=3, lists="dense").to_dict() for name in ("attention", "moba", "nsa")
    ]
    for config, name in zip(configs, ("attention", "moba", "nsa"), strict=True):
        assert config["model"].pop("pattern") == (name,)
        options = config["model"].pop("mixers")[name]
        heads = (12, 3) if full else (4, 2)
        assert (options["heads"], options["kv_heads"]) == heads
        assert (options.get("implementation") == "dense") == (name != "attention")
    assert configs[0] == configs[1] == configs[2]
    assert configs[0]["train"]["steps"] == 7
    assert configs[0]["optimizer"]["warmup_steps"] < 7
    assert configs[0]["seed"] == 3


def test_parameters_of_the_large_models():
    count = lambda name: sum(  # noqa: E731
        math.prod(x.shape) for x in blueprint(model_maker(routed_125m.get_config(name), 258)).shapes.values()
    )
    assert count("attention") == count("moba") == 124_081_920
    assert count("nsa") == 134_784_768


def test_an_unknown_mechanism():
    with pytest.raises(ValueError, match="mechanism: got 'mamba2'; needs one of attention, moba, nsa, infllm2"):
        routed_small.get_config("mamba2")


def test_smoothed_curves_are_means_of_neighbours():
    assert smoothed([(1, 4.0), (2, 3.0)]) == [(1, 4.0), (2, 3.0)]
    points = smoothed([(step, 2.0 * step) for step in range(1, 100)])
    assert points[0] == (1.5, 3.0)
    assert points[-1] == (99, 198.0)
    assert len(points) == routed_curves.POINTS


@pytest.mark.slow
def test_the_runs(monkeypatch, tmp_path):
    def tiny(name):
        config = routed_small.routed(name, routed_small.MIXERS, heads=4, kv_heads=2)
        config.model.dim, config.model.mlp_dim, config.model.repeats = 32, 48, 1
        config.data.batch_size, config.data.sequence_length = 8, 64
        config.eval.max_bytes = 600
        return config

    monkeypatch.setattr(routed_small, "get_config", tiny)
    flags = ["--steps=3", "--mechanism=attention", "--mechanism=nsa", f"--output={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["routed_curves", *flags])
    routed_curves.main()
    report = json.loads((tmp_path / "routed_curves.json").read_text())
    assert [row["mechanism"] for row in report["rows"]] == ["attention", "nsa"]
    for row in report["rows"]:
        assert row["steps"] == 3
        assert [step for step, _ in row["training"]] == [1, 2, 3]
        assert row["held_out"][-1] == [3, row["bits_per_byte"]]
    assert report["command"] == " ".join(["python -m experiments.routed_curves", *flags])
    assert (tmp_path / "routed_curves.png").stat().st_size > 1000
