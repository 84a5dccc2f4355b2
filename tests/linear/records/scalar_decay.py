"""Scalar decay with gates per token, per head and without."""

import jax.numpy as jnp
import numpy as np

from effattn_jax.linear.scalar_chunkwise import chunkwise
from effattn_jax.linear.scalar_decay import scalar_decay, scalar_decay_map
from tests.linear.draw import draw_qkv, log_decays
from tests.linear.oracle import by_head
from tests.linear.suite import Engine


def _draw_none(rng, sizes, strength):
    return draw_qkv(rng, sizes)


def _draw_per_head(rng, sizes, strength):
    return draw_qkv(rng, sizes) | {"log_decay": log_decays(rng, (max(sizes.heads),), strength)}


def _draw_per_token(rng, sizes, strength):
    shape = (sizes.batch, sizes.length, max(sizes.heads))
    return draw_qkv(rng, sizes) | {"log_decay": log_decays(rng, shape, strength)}


def _token(state, q, k, v, log_decay=0.0):
    state = np.exp(log_decay) * state + np.outer(k, v)
    return state, state.T @ q * len(q) ** -0.5


def _chunkwise(inputs, initial_state, segment_ids, chunk):
    q, k, v, g = (inputs.get(name) for name in ("q", "k", "v", "log_decay"))
    g = jnp.zeros(initial_state.shape[1], initial_state.dtype) if g is None else g
    return chunkwise(q, k, v, g, initial_state, segment_ids, q.shape[-1] ** -0.5, chunk)


def _map(inputs, segment_ids):
    return scalar_decay_map(inputs["k"], inputs["v"], inputs.get("log_decay"), segment_ids=segment_ids)


def _record(name, draw, static=(), **fields):
    return Engine(
        name,
        scalar_decay,
        _chunkwise,
        draw,
        by_head(_token, static),
        gates=("log_decay",),
        static=static,
        map=_map,
        groups=((2, 2, 4), (4, 2, 2), (1, 4, 2)),
        **fields,
    )


RECORDS = [
    _record("scalar_decay", _draw_per_token),
    _record("scalar_decay, per head", _draw_per_head, static=("log_decay",), variant=True),
    _record("scalar_decay, none", _draw_none, variant=True),
]
