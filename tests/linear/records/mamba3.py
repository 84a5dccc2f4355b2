"""The memory of Mamba-3."""

import functools

import numpy as np

from effattn_jax.linear.mamba3 import Mamba3Memory, Tokens, by_scalar_decay, mamba3
from effattn_jax.linear.scalar_chunkwise import chunkwise
from tests.linear.draw import draw_qkv, log_decays
from tests.linear.suite import Engine, head_values

TURNS = 1 / 8  # a drawn state holds numbers of the size 1, the memory angles within half a turn


def _draw(rng, sizes, strength):
    shape = head_values(sizes)[:3]
    return draw_qkv(rng, sizes) | {
        "log_decay": log_decays(rng, shape, strength),
        "dt": np.logaddexp(0, rng.standard_normal(shape, np.float32)),
        "mix": rng.uniform(0, 1, shape).astype(np.float32),
        "angle": rng.standard_normal((*shape, sizes.key_dim // 4), np.float32),
    }


def _shapes(sizes):
    batch, heads = sizes.batch, max(sizes.heads)
    key, value = sizes.key_dim, sizes.value_dim
    return Mamba3Memory(
        (batch, heads, key, value), (batch, heads, key // 4), (batch, heads, key), (batch, heads, value)
    )


def _scaled(state, factor):
    return None if state is None else state._replace(turns=state.turns * factor)


def _function(initial_state=None, **arguments):
    out, state = mamba3(**arguments, initial_state=_scaled(initial_state, TURNS))
    return out, _scaled(state, 1 / TURNS)


def _chunkwise(inputs, initial_state, segment_ids, chunk):
    engine = functools.partial(chunkwise, scale=1.0, chunk=chunk)
    start = _scaled(initial_state, TURNS)
    out, state = by_scalar_decay(Tokens(**inputs), start, segment_ids, engine)
    return out, _scaled(state, 1 / TURNS)


def _row(inputs, state):
    """Pairs of channels as complex numbers, turned by e^{i phase}."""
    q, k, v, g, dt, mix, angle = (inputs[x] for x in ("q", "k", "v", "log_decay", "dt", "mix", "angle"))
    S, turns, key, value = (np.array(x, np.float64) for x in state)
    phase, out, pairs = 2 * np.pi * TURNS * turns, np.zeros(v.shape), angle.shape[-1]

    def turn(x, phase):
        x = np.ascontiguousarray(x)
        x[: 2 * pairs] = (x[: 2 * pairs].view(np.complex128) * np.exp(1j * phase)).view(np.float64)
        return x

    for time, head in np.ndindex(v.shape[:2]):
        at = (time, head)
        phase[head] += angle[at]
        query, new = turn(q[at].copy(), phase[head]), turn(k[at].copy(), phase[head])
        old = (1 - mix[at]) * dt[at] * np.outer(key[head], value[head])
        S[head] = np.exp(g[at]) * (S[head] + old) + mix[at] * dt[at] * np.outer(new, v[at])
        key[head], value[head] = new, v[at]
        out[at] = S[head].T @ query
    turns = phase / (2 * np.pi)
    return out, Mamba3Memory(S, (turns - np.round(turns)) / TURNS, key, value)


RECORDS = [
    Engine(
        "mamba3",
        _function,
        _chunkwise,
        _draw,
        _row,
        gates=("log_decay", "dt", "mix", "angle", "initial_state"),  # the state holds a sum of angles
        state=_shapes,
        forms=("recurrent", "chunkwise"),  # the others differ by the form of scalar_decay alone
        bad={
            "fewer keys": ("k", lambda x: x[:, :, :2]),
            "gates per head": ("log_decay", lambda x: x[0, 0]),
            "integer steps": ("dt", lambda x: x.astype(np.int32)),
            "mix of other length": ("mix", lambda x: x[:, :-1]),
            "an angle for all heads": ("angle", lambda x: x[:, :, 0]),
            "more angles than pairs": ("angle", lambda x: np.concatenate([x] * 3, -1)),
        },
    )
]
