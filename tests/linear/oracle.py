"""The oracle of the oracle: numpy loops in float64, straight from the equation of an engine."""

import jax
import numpy as np


def unpacked(engine, inputs, initial_state=None):
    """One document per row: (out [B, T, ...], final state [B, ...])."""
    batch, length = next(x.shape[:2] for name, x in inputs.items() if name not in engine.static)
    ids = np.zeros((batch, length), np.int32)
    return packed(engine, inputs, initial_state, ids)


def packed(engine, inputs, initial_state, segment_ids):
    """Each document on its own; the initial state is the first one's, the final state the last one's."""
    inputs = {name: np.asarray(x, np.float64) for name, x in inputs.items()}
    outs, states = [], []
    for row, ids in enumerate(segment_ids):
        state = jax.tree.map(lambda x, row=row: np.array(x[row], np.float64), initial_state)
        out = None
        for i, document in enumerate(np.unique(ids[ids >= 0])):
            if i:
                state = jax.tree.map(np.zeros_like, state) if engine.fresh is None else engine.fresh(inputs)
            tokens = np.flatnonzero(ids == document)
            part = {name: x if name in engine.static else x[row, tokens] for name, x in inputs.items()}
            y, state = engine.row(part, state)
            out = np.zeros((len(ids), *y.shape[1:])) if out is None else out
            out[tokens] = y
        outs.append(out)
        states.append(state)
    width = next(y.shape for y in outs if y is not None)
    out = np.stack([np.zeros(width) if y is None else y for y in outs])
    return out, jax.tree.map(lambda *x: np.stack(x), *states)


def by_head(token, static=()):
    """The equation of a row from that of a token of a head, (state [K, V], **token) -> (state, out [V]).

    Arguments with fewer heads than the state serve consecutive ones each.
    """

    def row(inputs, state):
        heads = len(state)
        length = next(len(x) for name, x in inputs.items() if name not in static)
        state, out = np.array(state), np.zeros((length, heads, state.shape[-1]))
        for head, time in np.ndindex(heads, length):
            seen = {
                name: x[head] if name in static else x[time, head // (heads // x.shape[1])]
                for name, x in inputs.items()
            }
            state[head], out[time, head] = token(state[head], **seen)
        return out, state

    return row
