"""The neural memory of Titans: networks of one, two and three layers."""

from itertools import pairwise

import numpy as np

from effattn_jax.linear.memory_network import Loss
from effattn_jax.linear.titans_chunkwise import chunkwise
from effattn_jax.linear.titans_memory import TitansState, titans_memory
from effattn_jax.linear.titans_recurrent import tokens_of
from tests.linear.draw import draw_qkv, log_decays, unit
from tests.linear.suite import Engine

CHUNK = 16
GATES = ("theta", "eta", "alpha")


def _weights(inputs):
    return tuple(inputs[name] for name in sorted(inputs) if name.startswith("W"))


def _dims(sizes, depth):
    return [sizes.key_dim, *(sizes.key_dim + 4 - i for i in range(depth - 1)), sizes.value_dim]


def _gates(rng, shape, strength):
    """Small steps where the memory forgets slowly: what a chunk learns from its start must not overshoot. And a mild
    forgetting that leaves something to read after 200 tokens in every layer of a network."""
    largest = {"mild": 0.02, "weak": 0.001, "strong": 0.05}.get(strength, 0.2)
    forget = 0.05 if strength == "mild" else 1
    return {
        "theta": (largest / (1 + np.exp(rng.standard_normal(shape)))).astype(np.float32),
        "eta": np.exp(log_decays(rng, shape, strength)),
        "alpha": -np.expm1(forget * log_decays(rng, shape, strength)),
    }


def _normal(rng, shape):
    return (rng.standard_normal(shape) * shape[-2] ** -0.5).astype(np.float32)


def _record(name, depth, activation="gelu", **fields):
    names = tuple(f"W{i}" for i in range(depth))

    def draw(rng, sizes, strength):
        inputs = draw_qkv(rng, sizes)
        inputs |= {name: unit(inputs[name]) for name in "qk"}  # as in the layer
        heads, dims = max(sizes.heads), _dims(sizes, depth)
        shapes = [(heads, i, o) for i, o in pairwise(dims)]
        weights = {name: _normal(rng, shape) for name, shape in zip(names, shapes, strict=True)}
        return inputs | _gates(rng, inputs["q"].shape[:3], strength) | weights

    def draw_state(rng, sizes):
        heads, dims = max(sizes.heads), _dims(sizes, depth)
        shapes = [(sizes.batch, heads, i, o) for i, o in pairwise(dims)]
        weights = lambda size: tuple(size * _normal(rng, shape) for shape in shapes)  # noqa: E731
        place = rng.integers(0, CHUNK, sizes.batch, np.int32)
        return TitansState(weights(np.float32(1)), weights(np.float32(0.01)), weights(np.float32(1)), place)

    def fresh(inputs):
        weights = _weights(inputs)
        return TitansState(weights, tuple(np.zeros_like(w) for w in weights), weights, np.int32(0))

    def function(q, k, v, theta, eta, alpha, **options):
        weights = [options.pop(name) for name in names]
        return titans_memory(q, k, v, theta, eta, alpha, weights, chunk=CHUNK, activation=activation, **options)

    def windows(inputs, initial_state, segment_ids, window):
        tokens = tokens_of(*(inputs[name] for name in ("q", "k", "v", *GATES)), segment_ids)
        loss = Loss(activation, 2.0, None)
        return chunkwise(tokens, _weights(inputs), loss, CHUNK, initial_state, segment_ids, window=window)

    def row(inputs, state):
        return _row(inputs, state, activation)

    return Engine(
        name,
        function,
        windows,
        draw,
        row,
        gates=GATES,
        static=names,
        fresh=fresh,
        draw_state=draw_state,
        forms=("recurrent", "chunkwise", "associative"),
        bad={
            "gates of other length": ("eta", lambda x: x[:, :-1]),
            "gates without heads": ("alpha", lambda x: x[..., 0]),
            "integer step": ("theta", lambda x: x.astype(np.int32)),
        },
        **fields,
    )


def _activate(x, activation):
    """f(x) and f'(x)."""
    if activation == "silu":
        s = 1 / (1 + np.exp(-x))
        return x * s, s + x * s * (1 - s)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    t = np.tanh(inner)
    return x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t**2) * slope / 2


def _network(weights, x, activation):
    """What each layer reads, the slope before it, and the answer."""
    reads, slopes = [x], []
    for i, w in enumerate(weights):
        z = reads[-1] @ w
        if i == len(weights) - 1:
            return reads, slopes, z
        y, slope = _activate(z, activation)
        reads.append(y)
        slopes.append(slope)


def _row(inputs, state, activation):
    """A head at a time, a token at a time."""
    length, heads = inputs["q"].shape[:2]
    out = np.zeros((length, heads, inputs["v"].shape[-1]))
    memory, momentum, start = ([np.array(w) for w in part] for part in state[:3])
    for head in range(heads):
        M, S, M0, place = *([w[head] for w in part] for part in (memory, momentum, start)), int(state.place)
        for t in range(length):
            q, k, v, theta, eta, alpha = (inputs[name][t, head] for name in ("q", "k", "v", *GATES))
            reads, slopes, z = _network(M0, k, activation)
            delta = 2 * (z - v)
            for i in reversed(range(len(M0))):
                S[i] = eta * S[i] - theta * np.outer(reads[i], delta)
                delta = (M0[i] @ delta) * slopes[i - 1] if i else None
            M = [(1 - alpha) * m + s for m, s in zip(M, S, strict=True)]
            out[t, head] = _network(M, q, activation)[2]
            place = (place + 1) % CHUNK
            M0 = M if place == 0 else M0
        for part, new in ((memory, M), (momentum, S), (start, M0)):
            for i, w in enumerate(new):
                part[i][head] = w
    place = (int(state.place) + length) % CHUNK
    return out, TitansState(tuple(memory), tuple(momentum), tuple(start), place)


RECORDS = [
    _record("titans_memory", 2),
    _record("titans_memory, linear", 1, variant=True),
    _record("titans_memory, three layers", 3, activation="silu", variant=True),
]
