"""Numbers of a layer that are no parameters: training leaves them as they are, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers import MIXERS
from effattn_jax.layers.buffer import Buffer
from effattn_jax.models import LanguageModel
from effattn_jax.models.blueprint import blueprint, parameters_of
from effattn_jax.training.optimizer import default_config, make_optimizer
from effattn_jax.training.sharding import make_mesh
from effattn_jax.training.step import TrainState, decay_mask, make_train_step
from tests.layers.catalogue import DIM, RECORDS, jit

MIXERS_WITH_BUFFERS = {
    "performer": {"heads": 2, "features": 6},
    "fast_weight": {"heads": 2, "feature_map": "favor", "features": 6},
    "lightning": {"heads": 2},
    "hgrn": {},
    "hgrn2": {"head_dim": 8},
}


def make(mixer):
    sizes = {"vocab_size": 20, "dim": DIM, "mlp_dim": 0, "repeats": 2}
    return LanguageModel(**sizes, pattern=(mixer,), mixers=MIXERS_WITH_BUFFERS, rngs=nnx.Rngs(0))


def batches(count):
    rng = np.random.default_rng(0)
    where = {"segment_ids": np.zeros((2, 8), np.int32), "positions": np.tile(np.arange(8, dtype=np.int32), (2, 1))}
    for _ in range(count):
        tokens = rng.integers(0, 20, (2, 9), dtype=np.int32)
        yield where | {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("mixer", MIXERS_WITH_BUFFERS)
def test_no_step_moves_them(mixer):
    """Clipping, AdamW and weight decay; all parameters move."""
    config = default_config()
    config.update(learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=0.1)
    plan = blueprint(lambda: make(mixer))
    optimizer = make_optimizer(config, 10, decay_mask(plan))
    start = jit(lambda: parameters_of(make(mixer)))()
    assert plan.buffers
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    step = make_train_step(plan, optimizer, mesh)
    state = TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, start), optimizer.init(start))
    for batch in batches(3):
        state, _ = step(state, batch)
    for name, before in start.items():
        if name in plan.buffers:
            assert np.asarray(state.parameters[name]).tobytes() == np.asarray(before).tobytes(), name
        else:
            assert np.all(np.abs(state.parameters[name] - before).max(axis=-1) > 1e-3), name


@pytest.mark.slow
def test_no_mixer_with_constants_is_left_out():
    def has_buffers(record):
        make = lambda: record.layer(DIM, **record.options, rngs=nnx.Rngs(0))  # noqa: E731
        return bool(nnx.to_flat_state(nnx.state(nnx.eval_shape(make), Buffer)))

    found = {record.layer for record in RECORDS.values() if has_buffers(record)}
    assert found == {MIXERS[name] for name in MIXERS_WITH_BUFFERS}
