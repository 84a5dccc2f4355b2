"""Vector decay, read after the write and before it, with gates per token and per head."""

import numpy as np

from effattn_jax.linear.vector_decay import chunkwise, vector_decay, vector_decay_map
from tests.linear.draw import draw_qkv, log_decays
from tests.linear.oracle import by_head
from tests.linear.suite import Engine


def _draw(per_token, with_bonus):
    def draw(rng, sizes, strength):
        per_head = (max(sizes.heads), sizes.key_dim)
        shape = (sizes.batch, sizes.length, *per_head) if per_token else per_head
        inputs = draw_qkv(rng, sizes) | {"log_decay": log_decays(rng, shape, strength)}
        return inputs | {"bonus": rng.standard_normal(per_head, np.float32)} if with_bonus else inputs

    return draw


def _token(state, q, k, v, log_decay, bonus=None):
    after = np.exp(log_decay)[:, None] * state + np.outer(k, v)
    seen = after.T @ q if bonus is None else state.T @ q + np.dot(q, bonus * k) * v
    return after, seen * len(q) ** -0.5


def _chunkwise(inputs, initial_state, segment_ids, chunk):
    q, k, v, g = (inputs[name] for name in ("q", "k", "v", "log_decay"))
    out, state = chunkwise(q, k, v, g, inputs.get("bonus"), initial_state, segment_ids, chunk=chunk)
    return out * q.shape[-1] ** -0.5, state


def _map(inputs, segment_ids):
    return vector_decay_map(inputs["k"], inputs["v"], inputs["log_decay"], segment_ids=segment_ids)


def _record(name, *, per_token, with_bonus, variant=False):
    static = tuple(name for name, is_static in (("log_decay", not per_token), ("bonus", with_bonus)) if is_static)
    return Engine(
        name,
        vector_decay,
        _chunkwise,
        _draw(per_token, with_bonus),
        by_head(_token, static),
        gates=("log_decay", "bonus"),
        static=static,
        map=_map,
        groups=((2, 2, 4), (4, 2, 2), (1, 4, 2)),
        variant=variant,
    )


RECORDS = [
    _record("vector_decay", per_token=True, with_bonus=False),
    _record("vector_decay, bonus", per_token=True, with_bonus=True),
    _record("vector_decay, per head", per_token=False, with_bonus=False, variant=True),
    _record("vector_decay, bonus, per head", per_token=False, with_bonus=True, variant=True),
]
