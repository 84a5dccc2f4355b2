"""Kernels behind `implementation=`: named on a CPU they are interpreted, and None takes none of them there."""

import functools

import jax
import numpy as np
import pytest

from effattn_jax.linear import scalar_decay, vector_decay
from tests.linear.packings import row
from tests.ratio import FLOAT32, assert_close

IDS = np.stack([row((0, 50), (1, 1), (2, 59), (-1, 20))])


def draw(channels, bonus):
    rng = np.random.default_rng(0)
    randn = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    q, k, v = (randn(1, 130, 2, size) for size in (24, 24, 40))
    inputs = {"q": q, "k": k, "v": v, "log_decay": np.asarray(jax.nn.log_sigmoid(randn(1, 130, 2, *channels)))}
    return inputs | ({"bonus": randn(2, 24)} if bonus else {}) | {"initial_state": randn(1, 2, 24, 40)}


@pytest.mark.parametrize(
    ("engine", "channels", "bonus"),
    [(scalar_decay, (), False), (vector_decay, (24,), False), (vector_decay, (24,), True)],
    ids=["scalar", "vector", "bonus"],
)
@pytest.mark.quick_cases(1)
def test_by_name_on_a_cpu(engine, channels, bonus):
    inputs = draw(channels, bonus)
    run = functools.partial(engine, segment_ids=IDS, scale=0.3)
    assert_close(run(**inputs, form="recurrent"), run(**inputs, implementation="mosaic_tpu"), FLOAT32)
    assert "pallas" not in str(jax.make_jaxpr(functools.partial(run, implementation=None))(**inputs))
    with pytest.raises(NotImplementedError, match="needs 'chunkwise'"):
        run(**inputs, form="parallel", implementation="mosaic_tpu")
