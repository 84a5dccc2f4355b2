"""Mesa. To the suite its state is one matrix [H | R]."""

import jax.numpy as jnp
import numpy as np

from effattn_jax.linear.mesa import MesaState, chunkwise, mesa, mesa_map
from tests.linear.draw import draw_qkv, log_decays, unit
from tests.linear.suite import Engine


def _draw(rng, sizes, strength):
    heads = max(sizes.heads)
    shape = (sizes.batch, sizes.length, heads)
    x = draw_qkv(rng, sizes)
    return x | {
        "q": unit(x["q"]),
        "k": unit(x["k"]),
        "beta": 1 / (1 + np.exp(-rng.standard_normal(shape, np.float32))),
        "log_decay": log_decays(rng, shape, strength),
        "ridge": 0.25 + np.logaddexp(0, rng.standard_normal((heads, sizes.key_dim), np.float32)),
    }


def _draw_state(rng, sizes):
    """[H | R], H a sum of squares."""
    shape = (sizes.batch, max(sizes.heads), sizes.key_dim)
    root = rng.standard_normal((*shape, sizes.key_dim), np.float32)
    h = root @ np.swapaxes(root, -1, -2) / max(sizes.key_dim, 1)
    return np.concatenate([h, rng.standard_normal((*shape, sizes.value_dim), np.float32)], -1)


def _split(state, inputs):
    key_dim = inputs["q"].shape[-1]
    return None if state is None else MesaState(state[..., :key_dim], state[..., key_dim:])


def _function(*, initial_state, segment_ids, form, implementation=None, **inputs):
    options = {"segment_ids": segment_ids, "form": form, "implementation": implementation}
    out, state = mesa(**inputs, initial_state=_split(initial_state, inputs), **options)
    return out, jnp.concatenate(state, -1)


def _chunkwise(inputs, initial_state, segment_ids, chunk):
    arguments = (inputs[name] for name in ("q", "k", "v", "beta", "log_decay", "ridge"))
    h, r = _split(initial_state, inputs)
    state = MesaState((h + jnp.swapaxes(h, -1, -2)) / 2, r)  # as `mesa` does before it
    out, state = chunkwise(*arguments, state, segment_ids, chunk=chunk)
    return out, jnp.concatenate(state, -1)


def _row(inputs, state):
    length, heads, value_dim = inputs["v"].shape
    state, out = np.array(state), np.zeros((length, heads, value_dim))
    for head, t in np.ndindex(heads, length):
        q, k, v, beta, g = (inputs[name][t, head] for name in ("q", "k", "v", "beta", "log_decay"))
        state[head] = np.exp(g) * state[head] + beta * np.outer(k, np.concatenate([k, v]))
        h, r = np.split(state[head], [len(k)], axis=1)
        out[t, head] = r.T @ np.linalg.solve(h + np.diag(inputs["ridge"][head]), q)
    return out, state


def _map(inputs, segment_ids):
    return mesa_map(*(inputs[name] for name in ("k", "v", "beta", "log_decay")), segment_ids=segment_ids)


RECORDS = [
    Engine(
        "mesa",
        _function,
        _chunkwise,
        _draw,
        _row,
        gates=("beta", "log_decay", "ridge"),
        static=("ridge",),
        draw_state=_draw_state,
        map=_map,
        bad={
            "beta of other heads": ("beta", lambda x: x[:, :, :-1]),
            "log_decay of other length": ("log_decay", lambda x: x[:, :-1]),
            "ridge of other width": ("ridge", lambda x: x[:, :-1]),
            "integer ridge": ("ridge", lambda x: x.astype(np.int32)),
        },
    )
]
