"""Diagonal recurrences with channels in heads, and without heads."""

import jax.numpy as jnp
import numpy as np

from effattn_jax.linear.diagonal_scan import FORMS, chunkwise, diagonal_scan, diagonal_scan_map
from tests.linear.draw import log_decays
from tests.linear.suite import Engine, head_values


def _draw(rng, sizes, strength):
    shape = head_values(sizes)
    return {"x": rng.standard_normal(shape, np.float32), "log_decay": log_decays(rng, shape, strength)}


def _row(inputs, state):
    out = np.zeros(inputs["x"].shape)
    for time, (x, g) in enumerate(zip(inputs["x"], inputs["log_decay"], strict=True)):
        state = np.exp(g) * state + x
        out[time] = state
    return out, state


def _chunkwise(inputs, initial_state, segment_ids, chunk):
    return chunkwise(inputs["x"], inputs["log_decay"], initial_state, segment_ids, chunk=chunk)


RECORDS = [
    Engine(
        "diagonal_scan",
        diagonal_scan,
        _chunkwise,
        _draw,
        _row,
        gates=("log_decay",),
        state=lambda sizes: (sizes.batch, max(sizes.heads), sizes.value_dim),
        read=("x", "log_decay"),
        map=lambda inputs, segment_ids: diagonal_scan_map(**inputs, segment_ids=segment_ids),
        forms=FORMS,
        bad={
            "integer x": ("x", lambda x: x.astype(np.int32)),
            "x without channels": ("x", lambda x: x[:, :, 0, 0]),
            "gates of other width": ("log_decay", lambda x: x[..., :-1]),
            "gates per head": ("log_decay", lambda x: x[..., 0]),
            "integer gates": ("log_decay", lambda x: x.astype(np.int32)),
            "state with an axis more": ("initial_state", lambda x: jnp.asarray(x)[..., None]),
        },
        output_is_state=True,
    )
]
