"""The engines under test. A new one is a record in ENGINES; tests/linear/test_contract.py does the rest."""

import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear import scalar_decay as scalar_decay_function
from effattn_jax.linear.scalar_decay import chunkwise
from tests.linear.suite import Engine


def log_decays(rng, shape, strength):
    """mild: e^g all over (0, 1); weak: e^g near 1; strong: -30 on a fifth of the tokens, between weak ones;
    heavy: e^g from 1e-7 to 1e-3; extreme: -30 everywhere."""
    mild = -np.logaddexp(0, rng.standard_normal(shape))
    weak = -0.01 * np.abs(rng.standard_normal(shape))
    strong = np.where(rng.permuted(np.arange(weak.size) % 5 == 0).reshape(shape), -30, weak)
    g = {
        "mild": mild,
        "weak": weak,
        "strong": strong,
        "heavy": rng.uniform(-16, -7, shape),
        "extreme": np.full(shape, -30),
    }[strength]
    return g.astype(np.float32)


def draw_qkv(rng, sizes):
    dims = (sizes.key_dim, sizes.key_dim, sizes.value_dim)
    return {
        name: rng.standard_normal((sizes.batch, sizes.length, heads, dim), np.float32)
        for name, heads, dim in zip("qkv", sizes.heads, dims, strict=True)
    }


def _draw_none(rng, sizes, strength):
    return draw_qkv(rng, sizes)


def _draw_per_head(rng, sizes, strength):
    return draw_qkv(rng, sizes) | {"log_decay": log_decays(rng, (max(sizes.heads),), strength)}


def _draw_per_token(rng, sizes, strength):
    shape = (sizes.batch, sizes.length, max(sizes.heads))
    return draw_qkv(rng, sizes) | {"log_decay": log_decays(rng, shape, strength)}


def _scalar_decay_token(state, q, k, v, log_decay=0.0):
    state = np.exp(log_decay) * state + np.outer(k, v)
    return state, state.T @ q * len(q) ** -0.5


def _scalar_decay_chunkwise(inputs, initial_state, segment_ids, chunk):
    q, k, v, g = (inputs.get(name) for name in ("q", "k", "v", "log_decay"))
    g = jnp.zeros(initial_state.shape[1], initial_state.dtype) if g is None else g
    out, state = chunkwise(q, k, v, g, initial_state, segment_ids, chunk=chunk)
    return out * q.shape[-1] ** -0.5, state


def _scalar_decay(name, draw, **fields):
    return Engine(
        name, scalar_decay_function, _scalar_decay_chunkwise, draw, _scalar_decay_token, gates=("log_decay",), **fields
    )


ENGINES = [
    _scalar_decay("scalar_decay", _draw_per_token),
    _scalar_decay("scalar_decay, per head", _draw_per_head, per_head=("log_decay",), variant=True),
    _scalar_decay("scalar_decay, none", _draw_none, variant=True),
]

every_engine = pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
every_engine_dear = pytest.mark.parametrize(
    "engine",
    [pytest.param(e, id=e.name, marks=[pytest.mark.slow] if e.variant else []) for e in ENGINES],
)
every_form = pytest.mark.parametrize("form", ["recurrent", "parallel", "chunkwise"])
every_other_form = pytest.mark.parametrize("form", ["parallel", "chunkwise"])
