"""The oracle of the oracle: a numpy loop over rows, heads and tokens in float64, straight from an engine's equation."""

import numpy as np


def unpacked(engine, inputs, initial_state=None):
    """One document per row: (out [B, T, H, V], final state [B, H, K, V])."""
    inputs = {name: np.asarray(x, np.float64) for name, x in inputs.items()}
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    batch, length = q.shape[:2]
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    out = np.zeros((batch, length, heads, v.shape[3]))
    state = np.zeros((batch, heads, k.shape[3], v.shape[3]))
    if initial_state is not None:
        state += np.asarray(initial_state, np.float64)
    for row, head, time in np.ndindex(batch, heads, length):
        token = {name: _token(engine, name, x, row, time, head, heads) for name, x in inputs.items()}
        state[row, head], out[row, time, head] = engine.token(state[row, head], **token)
    return out, state


def packed(engine, inputs, initial_state, segment_ids):
    """Each document on its own; the initial state is the first one's, the final state the last one's."""
    batch, length = segment_ids.shape
    heads = max(inputs[name].shape[2] for name in "qkv")
    out = np.zeros((batch, length, heads, inputs["v"].shape[3]))
    final = np.array(initial_state, np.float64)
    for row, ids in enumerate(segment_ids):
        state = final[row][None]
        for document in np.unique(ids[ids >= 0]):
            tokens = np.flatnonzero(ids == document)
            part = {name: engine.take(name, x, row, tokens) for name, x in inputs.items()}
            document_out, state = unpacked(engine, part, state)
            out[row, tokens], final[row] = document_out[0], state[0]
            state = np.zeros_like(state)
    return out, final


def _token(engine, name, x, row, time, head, heads):
    """What `head` sees of an argument: fewer heads than the state's serve consecutive ones each."""
    if name in engine.per_head:
        return x[head]
    return x[row, time, head // (heads // x.shape[2])]
