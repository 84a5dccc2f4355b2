"""The selective scan, with and without its skip. Channels are drawn as heads of several, which it does not know."""

import jax.numpy as jnp
import numpy as np

from effattn_jax.linear.selective_scan import chunkwise, selective_scan, selective_scan_map
from tests.linear.draw import log_decays
from tests.linear.suite import Engine, head_values


def _draw(rng, sizes, strength):
    """Decays e^{dt A} of the strength, by steps dt and rates A about -1."""
    shape, states = head_values(sizes), (sizes.batch, sizes.length, sizes.key_dim)
    randn = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    return {
        "x": randn(*shape),
        "dt": -log_decays(rng, shape, strength),
        "A": -np.exp(0.3 * randn(*shape[2:], sizes.key_dim)),
        "B": randn(*states),
        "C": randn(*states),
    }


def _draw_with_skip(rng, sizes, strength):
    D = rng.standard_normal(head_values(sizes)[2:], np.float32)
    return _draw(rng, sizes, strength) | {"D": D}


def _row(inputs, state):
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    state, y = np.array(state), np.zeros(x.shape)
    for time, head, channel in np.ndindex(x.shape):
        h, step = state[head, channel], dt[time, head, channel]
        h[:] = np.exp(step * A[head, channel]) * h + step * B[time] * x[time, head, channel]
        y[time, head, channel] = h @ C[time]
    return y + inputs.get("D", 0) * x, state


def _flat(inputs, initial_state=None):
    """Heads and their channels as the one axis of channels that the engine has."""
    axis = {"x": 2, "dt": 2, "A": 0, "D": 0}
    merge = lambda x, axis: x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])  # noqa: E731
    inputs = {name: merge(x, axis[name]) if name in axis else x for name, x in inputs.items()}
    return inputs, None if initial_state is None else merge(initial_state, 1)


def _with_heads(heads, y, state):
    return y.reshape(*y.shape[:2], *heads), state.reshape(state.shape[0], *heads, state.shape[2])


def _function(initial_state=None, segment_ids=None, form=None, implementation=None, **inputs):
    flat, state = _flat(inputs, initial_state)
    options = {"segment_ids": segment_ids, "form": form, "implementation": implementation}
    return _with_heads(inputs["x"].shape[2:], *selective_scan(**flat, initial_state=state, **options))


def _chunkwise(inputs, initial_state, segment_ids, chunk):
    flat, state = _flat(inputs, initial_state)
    D = flat.pop("D", 0)
    y, state = chunkwise(**flat, initial_state=state, segment_ids=segment_ids, chunk=chunk)
    if segment_ids is not None:
        D = jnp.where(segment_ids[..., None] >= 0, D, 0)
    return _with_heads(inputs["x"].shape[2:], y + D * flat["x"], state)


def _map(inputs, segment_ids):
    flat, _ = _flat(inputs)
    affine = selective_scan_map(*(flat[name] for name in ("x", "dt", "A", "B")), segment_ids=segment_ids)
    return type(affine)(*(x.reshape(len(x), *inputs["A"].shape) for x in affine))


def _record(name, draw, **fields):
    return Engine(
        name,
        _function,
        _chunkwise,
        draw,
        _row,
        gates=("dt", "A"),
        static=("A", "D"),
        heads={"B": None, "C": None},
        state=lambda sizes: (sizes.batch, max(sizes.heads), sizes.value_dim, sizes.key_dim),
        read=("x", "dt", "B", "C"),
        map=_map,
        bad={
            "integer x": ("x", lambda x: x.astype(np.int32)),
            "steps of other length": ("dt", lambda x: x[:, :-1]),
            "A of other width": ("A", lambda x: x[..., :-1]),
            "B of other length": ("B", lambda x: x[:, :-1]),
            "B without memories": ("B", lambda x: x[..., 0]),
            "C of other width": ("C", lambda x: x[..., :-1]),
            "integer C": ("C", lambda x: x.astype(np.int32)),
        },
        **fields,
    )


RECORDS = [
    _record("selective_scan", _draw_with_skip),
    _record("selective_scan, no skip", _draw, variant=True),
]
