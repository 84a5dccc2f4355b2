"""The memory of RWKV-4, with keys of several sizes."""

import functools

import numpy as np

from effattn_jax.linear.diagonal_scan import chunkwise
from effattn_jax.linear.rwkv4 import FORMS, RWKV4Memory, by_diagonal_scan, rwkv4, with_gradients
from tests.linear.draw import log_decays
from tests.linear.suite import Engine, head_values


def _draw(rng, sizes, strength):
    shape = head_values(sizes)
    return {
        "k": 3 * rng.standard_normal(shape, np.float32),
        "v": rng.standard_normal(shape, np.float32),
        "log_decay": log_decays(rng, shape[2:], strength),
        "bonus": rng.standard_normal(shape[2:], np.float32),
    }


def _chunkwise(inputs, initial_state, segment_ids, chunk):
    scan = functools.partial(chunkwise, segment_ids=None, chunk=chunk)
    algorithm = functools.partial(by_diagonal_scan, scan)
    return with_gradients(algorithm, **inputs, initial_state=initial_state, segment_ids=segment_ids)


def _shape(sizes):
    return (sizes.batch, max(sizes.heads), sizes.value_dim)


def _draw_state(rng, sizes):
    """Denominators are sums of weights of which the largest is 1."""
    randn = lambda: rng.standard_normal(_shape(sizes), np.float32)  # noqa: E731
    return RWKV4Memory(randn(), 1 + np.abs(randn()), 3 * randn())


def _row(inputs, state):
    """Sums of exponentials as they are: the keys are small enough for float64."""
    a, b, m = (np.array(x) for x in state)
    a, b = a * np.exp(m), b * np.exp(m)
    largest, out = m, np.zeros(inputs["v"].shape)
    for time, (k, v) in enumerate(zip(inputs["k"], inputs["v"], strict=True)):
        now = np.exp(inputs["bonus"] + k)
        out[time] = (a + now * v) / (b + now)
        a, b = (np.exp(inputs["log_decay"]) * old + np.exp(k) * new for old, new in ((a, v), (b, 1)))
        largest = np.maximum(largest + inputs["log_decay"], k)
    return out, RWKV4Memory(a * np.exp(-largest), b * np.exp(-largest), largest)


def _fresh(inputs):
    zeros = np.zeros(inputs["v"].shape[2:])
    return RWKV4Memory(zeros, zeros, zeros - 1e30)


RECORDS = [
    Engine(
        "rwkv4",
        rwkv4,
        _chunkwise,
        _draw,
        _row,
        gates=("log_decay", "bonus"),
        static=("log_decay", "bonus"),
        state=lambda sizes: RWKV4Memory(*(_shape(sizes),) * 3),
        draw_state=_draw_state,
        read=("k", "v"),
        fresh=_fresh,
        forms=FORMS,
        output_is_state=True,  # of its size: what is kept of tokens has a check of its own, in test_rwkv4.py
        bad={
            "integer k": ("k", lambda x: x.astype(np.int32)),
            "k without channels": ("k", lambda x: x[:, :, 0, 0]),
            "v of other width": ("v", lambda x: x[..., :-1]),
            "integer v": ("v", lambda x: x.astype(np.int32)),
            "a decay per token": ("log_decay", lambda x: x[None, None]),
            "bonus of other width": ("bonus", lambda x: x[..., :-1]),
        },
    )
]
