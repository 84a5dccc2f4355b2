"""Configs that do not fit: one clear line each, before training starts."""

import pytest

from effattn_jax.checks import ArgumentError
from effattn_jax.training.loop import train
from effattn_jax.training.setup import make_setup
from tests.training.tiny import get_config


def changed(**fields):
    """The tiny config with fields such as model__dim."""
    config = get_config()
    with config.unlocked():
        for name, value in fields.items():
            *parents, last = name.split("__")
            part = config
            for parent in parents:
                part = part[parent]
            part[last] = value
    return config


@pytest.mark.quick_cases(14)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__vocab_size": 200}, "model.vocab_size: got 200; needs at least 258"),
        ({"model__dtype": "float16"}, "model.dtype: got 'float16'; needs one of float32, bfloat16"),
        ({"model__mixers__local__window": 0}, "window: got 0; needs None or at least 1 key"),
        ({"model__mixers__local__window": -3}, "window: got -3"),
        ({"model__mixers__local__heads": 3}, "heads"),
        ({"model__mixers__local__kv_heads": 4}, "kv_heads: got 4 heads; needs a number that divides the 2 heads"),
        ({"model__mixers__mamba2__head_dim": 24}, "head_dim: got 24; needs a divisor of expand * dim = 64"),
        ({"model__mixers__mamba2__groups": 3}, "groups: got 3 heads"),
        ({"model__mixers__local__windw": 3}, "mixer 'attention'"),
        (
            {"model__pattern": ("mamba9",)},
            "pattern: got 'mamba9'; needs a name under mixers, or of a mixer: attention, ",
        ),
        (
            {"model__mixers__local__kind": "atention"},
            "mixer: got 'atention'; needs one of attention, causal_convolution, ",
        ),
        ({"model__pattern": ()}, "pattern: got"),
        ({"data__batch_size": 7, "train__microbatches": 2}, "batch_size: got 7; needs a multiple of 16"),
        ({"mesh__tensor": 3}, "mesh: got"),
        ({"mesh__data": 0}, "mesh: got"),
        ({"optimizer__schedule": "linear"}, "schedule: got 'linear'"),
        ({"optimizer__warmup_steps": 8}, "warmup_steps: got 8"),
        ({"train__step": "pmap"}, "train.step: got 'pmap'; needs one of jit, shard_map"),
        ({"train__step": "shard_map", "mesh__tensor": 2}, "mesh.tensor: got 2; needs size 1"),
        ({"data__tokenizer": "no/such.json"}, "tokenizer: no file no/such.json"),
    ],
)
def test_make_setup_says_what_is_wrong(fields, message):
    with pytest.raises((ArgumentError, FileNotFoundError)) as caught:
        make_setup(changed(**fields))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__name": "folder:no/such/folder"}, "folder:no/such/folder: no such folder"),
        ({"data__name": "no_such_dataset"}, "no_such_dataset"),
        ({"data__sequence_length": 0}, "sequence_length"),
        ({"train__eval_every": 0}, "train.eval_every: got 0; needs at least 1"),
        ({"data__batch_size": 4096}, "one at least for each of the 4096 rows"),
    ],
)
def test_train_says_what_is_wrong(fields, message, tmp_path):
    with pytest.raises((ArgumentError, FileNotFoundError)) as caught:
        train(changed(**fields), str(tmp_path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_that_takes_no_files():
    with pytest.raises(ArgumentError, match="workdir: got /proc/run"):
        train(get_config(), "/proc/run")
