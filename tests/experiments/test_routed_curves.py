"""The runs of `experiments.routed_curves` differ by their mixer alone, and dense lists are block attention."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import routed_125m, routed_small
from effattn_jax.models.blueprint import blueprint
from effattn_jax.sparse.block_attention import block_attention
from effattn_jax.training.setup import model_maker
from experiments import dense_lists, routed_curves
from experiments.routed_curves import configured, smoothed
from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close
from tests.sparse.inputs import qkv


@pytest.mark.parametrize("full", [False, True])
def test_runs_differ_by_their_mixer_alone(full):
    configs = [
        configured(name, full=full, steps=7, seed=3, dense=True).to_dict() for name in ("attention", "moba", "nsa")
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


def lists(length, count, block_size, heads):
    """[2, T, heads, n] of random blocks, some twice, some none, some beyond the row."""
    rng = np.random.default_rng(0)
    return rng.integers(-1, length // block_size + 2, (2, length, heads, count)).astype(np.int32)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.quick_cases(1)
def test_dense_lists_are_block_attention(packed, per_head, monkeypatch):
    q, k, v = qkv(45, value_dim=6)
    monkeypatch.setattr(dense_lists, "LOGITS", 45 * 100)  # some rows at a time
    ids = np.repeat([0, 1, 3, -1], [13, 1, 28, 3])[None].repeat(2, 0).astype(np.int32) if packed else None
    blocks = lists(45, 3, 8, 4 if per_head else 2)

    def loss(arrays, implementation):
        options = {"block_size": 8, "segment_ids": ids, "implementation": implementation}
        out, lse = block_attention(*arrays, blocks, **options)
        empty = jnp.isneginf(lse)
        lse = jnp.where(empty, 0, lse)
        return jnp.sum(out**2) + jnp.sum(jnp.sin(lse)), (out, lse, empty)

    want, got = (
        jit(jax.grad(lambda x, name=name: loss(x, name), has_aux=True))((q, k, v)) for name in ("xla", "dense")
    )
    assert want[1][2].any()
    assert_close(want, got, FLOAT32)


def test_dense_lists_refuse_a_further_mask():
    q, k, v = qkv(16)
    options = {"block_size": 8, "logits_soft_cap": 1.0, "implementation": "dense"}
    with pytest.raises(NotImplementedError, match="a mask beside the lists"):
        jax.eval_shape(lambda q, k, v: block_attention(q, k, v, lists(16, 2, 8, 2), **options), q, k, v)


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
