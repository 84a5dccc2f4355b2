"""The delta rule with unit keys and any beta in [0, 2], with gates per head, per channel and without."""

import numpy as np

from effattn_jax.linear.delta_rule import chunkwise, delta_rule, delta_rule_map
from tests.linear.draw import draw_qkv, log_decays, unit
from tests.linear.oracle import by_head
from tests.linear.suite import Engine


def draw_beta(rng, shape):
    """Uniform in (0, 2), with exact 0, 1 and 2 on a tenth of the tokens each."""
    exact = rng.choice([0, 1, 2], shape)
    return np.where(rng.random(shape) < 0.3, exact, rng.uniform(0, 2, shape)).astype(np.float32)


def _draw(gate):
    def draw(rng, sizes, strength):
        per_head = (sizes.batch, sizes.length, max(sizes.heads))
        inputs = draw_qkv(rng, sizes)
        inputs |= {"k": unit(inputs["k"]), "beta": draw_beta(rng, per_head)}
        shape = {"none": None, "scalar": per_head, "vector": (*per_head, sizes.key_dim)}[gate]
        return inputs if shape is None else inputs | {"log_decay": log_decays(rng, shape, strength)}

    return draw


def _token(state, q, k, v, beta, log_decay=0.0):
    state = np.exp(log_decay * np.ones(len(k)))[:, None] * state
    state = state + beta * np.outer(k, v - state.T @ k)
    return state, state.T @ q * len(q) ** -0.5


def _chunkwise(inputs, initial_state, segment_ids, chunk):
    q, k, v, beta, g = (inputs.get(name) for name in ("q", "k", "v", "beta", "log_decay"))
    g = g[..., None] if g is not None and g.ndim == 3 else g
    out, state = chunkwise(q, k, v, beta, g, initial_state, segment_ids, chunk=chunk)
    return out * q.shape[-1] ** -0.5, state


def _map(inputs, segment_ids):
    k, v, beta, g = (inputs.get(name) for name in ("k", "v", "beta", "log_decay"))
    return delta_rule_map(k, v, beta, g, segment_ids=segment_ids)


def _record(gate, **fields):
    bad = {
        "beta of other heads": ("beta", lambda x: x[:, :, :2]),
        "beta per channel": ("beta", lambda x: x[..., None]),
        "integer beta": ("beta", lambda x: x.astype(np.int32)),
        "gate of other length": ("log_decay", lambda x: x[:, :-1]),
        "gate of other heads": ("log_decay", lambda x: x[:, :, :2]),
        "integer gate": ("log_decay", lambda x: x.astype(np.int32)),
    }
    return Engine(
        f"delta_rule, {gate}",
        delta_rule,
        _chunkwise,
        _draw(gate),
        by_head(_token),
        gates=("beta", "log_decay"),
        groups=((2, 2, 4), (1, 4, 2)),
        read=("q", "beta"),
        map=_map,
        slow_forms=("parallel", "associative"),  # the parallel form is one chunk
        bad={case: x for case, x in bad.items() if gate != "none" or x[0] != "log_decay"},
        **fields,
    )


RECORDS = [_record("scalar"), _record("vector"), _record("none", variant=True)]
