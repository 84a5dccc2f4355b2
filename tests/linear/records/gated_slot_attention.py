"""Gated slot attention. To the suite its state is one matrix [K | V]."""

import jax.numpy as jnp
import numpy as np

from effattn_jax.linear.gated_slot_attention import SlotState, chunkwise, gated_slot_attention, gated_slot_map
from tests.linear.draw import draw_qkv, log_decays
from tests.linear.suite import Engine

SLOTS = 6


def _draw(rng, sizes, strength):
    shape = (sizes.batch, sizes.length, max(sizes.heads), SLOTS)
    return draw_qkv(rng, sizes) | {
        "s": rng.uniform(0, 1, shape).astype(np.float32),
        "log_decay": log_decays(rng, shape, strength),
    }


def _split(state, inputs):
    key_dim = inputs["q"].shape[-1]
    return None if state is None else SlotState(state[..., :key_dim], state[..., key_dim:])


def _function(*, initial_state, segment_ids, form, implementation=None, **inputs):
    options = {"segment_ids": segment_ids, "form": form, "implementation": implementation}
    out, state = gated_slot_attention(**inputs, initial_state=_split(initial_state, inputs), **options)
    return out, jnp.concatenate(state, -1)


def _chunkwise(inputs, initial_state, segment_ids, chunk):
    q, k, v, s, g = (inputs[name] for name in ("q", "k", "v", "s", "log_decay"))
    state = _split(initial_state, inputs)
    out, state = chunkwise(q * q.shape[-1] ** -0.5, k, v, s, g, state, segment_ids, chunk=chunk)
    return out, jnp.concatenate(state, -1)


def _row(inputs, state):
    length, heads, value_dim = len(inputs["v"]), len(state), inputs["v"].shape[-1]
    state, out = np.array(state), np.zeros((length, heads, value_dim))
    for head, t in np.ndindex(heads, length):
        q, k, v = (inputs[name][t, head // (heads // inputs[name].shape[1])] for name in "qkv")
        s, g = inputs["s"][t, head], inputs["log_decay"][t, head]
        for slot in range(len(s)):
            state[head, slot] = np.exp(g[slot]) * state[head, slot] + s[slot] * np.concatenate([k, v])
        keys, values = np.split(state[head], [len(k)], axis=1)
        logits = keys @ q / np.sqrt(len(q))
        weights = np.exp(logits - logits.max())
        out[t, head] = weights @ values / weights.sum()
    return out, state


def _map(inputs, segment_ids):
    return gated_slot_map(*(inputs[name] for name in ("k", "v", "s", "log_decay")), segment_ids=segment_ids)


RECORDS = [
    Engine(
        "gated_slot_attention",
        _function,
        _chunkwise,
        _draw,
        _row,
        gates=("log_decay",),
        state=lambda sizes: (sizes.batch, max(sizes.heads), SLOTS, sizes.key_dim + sizes.value_dim),
        map=_map,
        groups=((4, 2, 2), (1, 4, 2)),
        bad={
            "s of other heads": ("s", lambda x: x[:, :, :-1]),
            "s per head": ("s", lambda x: x[..., 0]),
            "integer s": ("s", lambda x: x.astype(np.int32)),
            "no slots": ("s", lambda x: x[..., :0]),
            "log_decay of other length": ("log_decay", lambda x: x[:, :-1]),
            "log_decay of fewer slots": ("log_decay", lambda x: x[..., :-1]),
        },
    )
]
