"""DPLR with the a and b of RWKV-7, and with small ones that are free, under gates per channel and per head."""

import numpy as np

from effattn_jax.linear.dplr import chunkwise, dplr, dplr_map
from tests.linear.draw import draw_qkv, log_decays, unit
from tests.linear.oracle import by_head
from tests.linear.suite import Engine


def draw_low_rank(rng, shape, free):
    """a and b that do not expand: -kappa and kappa * iclr with a unit kappa, or free ones of norm 0.3."""
    if free:
        return {name: 0.3 * unit(rng.standard_normal(shape).astype(np.float32)) for name in "ab"}
    kappa = unit(rng.standard_normal(shape).astype(np.float32))
    return {"a": -kappa, "b": kappa * rng.uniform(0, 1, shape).astype(np.float32)}


def _draw(free, per_channel):
    def draw(rng, sizes, strength):
        shape = (sizes.batch, sizes.length, max(sizes.heads), sizes.key_dim)
        low_rank = draw_low_rank(rng, (*shape[:2], sizes.heads[1], shape[3]), free)
        return draw_qkv(rng, sizes) | low_rank | {"log_decay": log_decays(rng, shape[: 3 + per_channel], strength)}

    return draw


def _token(state, q, k, v, a, b, log_decay):
    transition = np.diag(np.exp(log_decay * np.ones(len(k)))) + np.outer(b, a)
    state = transition @ state + np.outer(k, v)
    return state, state.T @ q * len(q) ** -0.5


def _chunkwise(inputs, initial_state, segment_ids, chunk):
    q, k, v, a, b, g = (inputs[name] for name in ("q", "k", "v", "a", "b", "log_decay"))
    g = g[..., None] if g.ndim == 3 else g
    out, state = chunkwise(q, k, v, a, b, g, initial_state, segment_ids, chunk=chunk)
    return out * q.shape[-1] ** -0.5, state


def _map(inputs, segment_ids):
    return dplr_map(*(inputs[name] for name in ("k", "v", "a", "b", "log_decay")), segment_ids=segment_ids)


BAD = {
    "a of other length": ("a", lambda x: x[:, :-1]),
    "a of other width": ("a", lambda x: x[..., :-1]),
    "a with heads that do not divide": ("a", lambda x: x[:, :, :3]),
    "b without heads": ("b", lambda x: x[:, :, 0]),
    "integer b": ("b", lambda x: x.astype(np.int32)),
    "gate of other length": ("log_decay", lambda x: x[:, :-1]),
    "gate of other heads": ("log_decay", lambda x: x[:, :, :2]),
    "integer gate": ("log_decay", lambda x: x.astype(np.int32)),
}


def _record(name, *, free, per_channel, **fields):
    return Engine(
        name,
        dplr,
        _chunkwise,
        _draw(free, per_channel),
        by_head(_token),
        gates=("log_decay",),
        groups=((2, 2, 4), (1, 4, 2)),
        map=_map,
        slow_forms=("parallel", "associative"),  # the parallel form is one chunk
        bad=BAD,
        **fields,
    )


RECORDS = [
    _record("dplr", free=False, per_channel=True),
    _record("dplr, free", free=True, per_channel=True, variant=True),
    _record("dplr, free, per head", free=True, per_channel=False, variant=True),
]
