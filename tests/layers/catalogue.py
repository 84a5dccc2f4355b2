"""The mixers that keep the contract. A new one adds a record; `tests/layers/test_*.py` do the rest."""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn_jax.layers.buffer import Buffer
from effattn_jax.models.blueprint import blueprint
from tests.layers.records import (
    delta,
    diagonal,
    fox,
    gated_slot_attention,
    linear_attention,
    log_linear_mesa,
    mamba2,
    path,
    routed,
    rwkv7,
    softmax,
    titans,
    ttt,
    vector_decay,
)
from tests.layers.records.record import BATCH, DIM
from tests.ratio import FLOAT32, error_ratio

RECORDS = {
    **softmax.RECORDS,
    **path.RECORDS,
    **routed.RECORDS,
    **fox.RECORDS,
    **linear_attention.RECORDS,
    **log_linear_mesa.RECORDS,
    **mamba2.RECORDS,
    **vector_decay.RECORDS,
    **gated_slot_attention.RECORDS,
    **delta.RECORDS,
    **diagonal.RECORDS,
    **titans.RECORDS,
    **rwkv7.RECORDS,
    **ttt.RECORDS,
}
EVERY = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if record.slow else []) for name, record in RECORDS.items()]
)

# Tests compile much and compute little.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def random(name: str, *shape: int) -> np.ndarray:
    """The same numbers for the same name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)


def agree(want: np.ndarray, got: jax.Array | np.ndarray, what: str = "", limit: float = FLOAT32) -> None:
    got = np.asarray(got)
    assert np.isfinite(got).all(), f"{what}: not finite"
    ratio = error_ratio(want, got)
    assert ratio <= limit, f"{what}: error ratio {ratio:.2e} > {limit:.0e}"


def filled(make: Callable[[], nnx.Module]) -> nnx.Module:
    """Weights far from their start: matrices by fan-in, scales around 1, gates, biases and sinks around 0, widely.
    Buffers keep their values."""
    plan = blueprint(make)
    buffers = nnx.to_flat_state(jit(lambda: nnx.state(make(), Buffer))())
    parameters = {".".join(map(str, path)): variable[...] for path, variable in buffers}
    for key in plan.shapes.keys() - parameters.keys():
        leaf = plan.shapes[key]
        own = leaf.shape[-sum(axis is not None for axis in plan.axes[key]) :]  # without an axis of repetitions
        x = random(key, *leaf.shape)
        x = x * own[0] ** -0.5 if len(own) > 1 else x * 0.5 + float(key.endswith("scale"))
        parameters[key] = jnp.asarray(x, jnp.float32)
    return plan.model(parameters)


@functools.cache
def layer(name: str, dtype: Any = jnp.float32) -> nnx.Module:
    record = RECORDS[name]
    return filled(lambda: record.layer(DIM, **record.options, dtype=dtype, rngs=nnx.Rngs(0)))


def inputs(length: int) -> np.ndarray:
    """The first tokens of always the same rows."""
    return random("inputs", BATCH, 128, DIM)[:, :length]


# One compilation each for a layer and a shape, whatever test asks for it.
forward = jit(lambda layer, x: layer(x)[0])
forward_documents = jit(lambda layer, x, ids: layer(x, segment_ids=ids)[0])
step = jit(lambda layer, x, state: layer(x, state))
step_documents = jit(lambda layer, x, state, ids: layer(x, state, segment_ids=ids))


@jit
def decode(layer, x, state):
    """Token by token: the state is the carry of a scan."""

    def body(state, token):
        y, state = layer(token[:, None], state)
        return state, y[:, 0]

    state, y = jax.lax.scan(body, state, jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(y, 0, 1), state


@jit
def decode_documents(layer, x, state, ids):
    def body(state, token):
        x, ids = token
        y, state = layer(x[:, None], state, segment_ids=ids[:, None])
        return state, y[:, 0]

    state, y = jax.lax.scan(body, state, (jnp.moveaxis(x, 1, 0), ids.T))
    return jnp.moveaxis(y, 0, 1), state
