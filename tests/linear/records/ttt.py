"""Test-time training of an affine map and of a network with a hidden layer. Mini-batches of 16, as in the paper."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax.linear import ttt_linear, ttt_mlp
from effattn_jax.linear.inner_loss import Affine, InnerNorm
from effattn_jax.linear.ttt_forms import Learner, Tokens, TTTState, chunkwise
from tests.linear.draw import draw_qkv
from tests.linear.suite import Engine

MINI_BATCH = 16


def _rates(rng, shape, strength):
    """sigmoid(randn), as layers give; small; small with one in five at the most a layer gives; that on all tokens."""
    mild = 1 / (1 + np.exp(-rng.standard_normal(shape)))
    weak = 0.01 * mild
    strong = np.where(rng.permuted(np.arange(weak.size) % 5 == 0).reshape(shape), 1, weak)
    return {"mild": mild, "weak": weak, "strong": strong, "heavy": np.ones(shape), "extreme": np.full(shape, 30)}[
        strength
    ]


def _drawer(widths):
    """`widths(K)` are those between layers."""

    def draw(rng, sizes, strength):
        heads, dim = sizes.heads[0], sizes.key_dim
        inputs = draw_qkv(rng, sizes._replace(value_dim=dim))
        inputs["lr"] = _rates(rng, (sizes.batch, sizes.length, heads), strength) / dim
        inputs["token_scale"] = 1 / np.arange(1, MINI_BATCH + 1) + 0.05 * rng.standard_normal(MINI_BATCH)
        for name, layer in zip(names(len(widths(dim)) - 1), _network(rng, (heads,), widths(dim)), strict=True):
            inputs |= dict(zip(name, layer, strict=True))
        inputs["ln_scale"] = 1 + 0.2 * rng.standard_normal((heads, dim))
        inputs["ln_bias"] = 0.2 * rng.standard_normal((heads, dim))
        return {name: x.astype(np.float32) for name, x in inputs.items()}

    return draw


def _network(rng, shape, widths, size=1.0):
    return [
        Affine(
            (size * width**-0.5 * rng.standard_normal((*shape, width, after))).astype(np.float32),
            (size * 0.3 * rng.standard_normal((*shape, after))).astype(np.float32),
        )
        for width, after in itertools.pairwise(widths)
    ]


def names(layers):
    return [("W", "b")] if layers == 1 else [(f"W{i + 1}", f"b{i + 1}") for i in range(layers)]


def _state_drawer(widths):
    """Inside a mini-batch, at any place but the first."""

    def draw(rng, sizes):
        shape, place = (sizes.batch, sizes.heads[0]), rng.integers(1, MINI_BATCH, sizes.batch).astype(np.int32)
        weights, gathered = (tuple(_network(rng, shape, widths(sizes.key_dim), size)) for size in (1.0, 0.3))
        return TTTState(weights, gathered, place)

    return draw


def _head_keys(sizes):
    return (sizes.batch, sizes.length, sizes.heads[0], sizes.key_dim)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x):
    """By a complex step, exact to rounding."""
    return np.imag(gelu(x + 1e-30j)) / 1e-30


def norm(z, scale, bias):
    z = z - z.mean()
    return scale * z / np.sqrt(np.mean(z**2) + 1e-6) + bias


def norm_jacobian(z, scale):
    """d LN(z)_a / d z_b."""
    centre = np.eye(len(z)) - 1 / len(z)
    s = np.sqrt(np.mean((centre @ z) ** 2) + 1e-6)
    h = centre @ z / s
    return scale[:, None] * (np.eye(len(z)) - np.outer(h, h) / len(z)) @ centre / s


def _one_head(layers, gathered, place, q, k, v, lr, token_scale, ln_scale, ln_bias):
    """Lists of [W, b]: the weights of the mini-batch and the sum of its gradients; changed in place."""
    seen = [k]
    for i, (W, b) in enumerate(layers):
        z = seen[-1] @ W + b
        seen.append(z if i == len(layers) - 1 else gelu(z))
    gradient = norm_jacobian(z, ln_scale).T @ (norm(z, ln_scale, ln_bias) - (v - k))
    for i in reversed(range(len(layers))):
        if i < len(layers) - 1:
            gradient = gradient * gelu_slope(seen[i] @ layers[i][0] + layers[i][1])
        gathered[i][0] += lr * np.outer(seen[i], gradient)
        gathered[i][1] += lr * gradient
        gradient = layers[i][0] @ gradient
    now = [
        [x - token_scale[place] * g for x, g in zip(*pair, strict=True)] for pair in zip(layers, gathered, strict=True)
    ]
    y = q
    for i, (W, b) in enumerate(now):
        y = y @ W + b
        y = y if i == len(now) - 1 else gelu(y)
    return q + norm(y, ln_scale, ln_bias), now


def row(inputs, state):
    weights, gathered, place = jax.tree.map(np.array, state)
    place = int(place)
    out = np.zeros(inputs["q"].shape)
    layers = range(len(weights))
    for t in range(len(out)):
        for h in range(out.shape[1]):
            shared = {name: inputs[name][h] for name in ("ln_scale", "ln_bias")}
            token = {name: inputs[name][t, h] for name in ("q", "k", "v", "lr")}
            own, sums = ([[x[h] for x in tree[i]] for i in layers] for tree in (weights, gathered))
            sums = [[x.copy() for x in pair] for pair in sums]
            out[t, h], now = _one_head(own, sums, place, **token, **shared, token_scale=inputs["token_scale"])
            closes = place == len(inputs["token_scale"]) - 1
            for i in layers:
                for j in range(2):
                    gathered[i][j][h] = 0 if closes else sums[i][j]
                    if closes:
                        weights[i][j][h] = now[i][j]
        place = (place + 1) % len(inputs["token_scale"])
    return out, TTTState(weights, gathered, np.int32(place))


def _fresh(layers):
    def fresh(inputs):
        weights = tuple(Affine(*(np.array(inputs[name]) for name in pair)) for pair in names(layers))
        return TTTState(weights, jax.tree.map(np.zeros_like, weights), np.int32(0))

    return fresh


def _chunkwise(layers):
    def run(inputs, initial_state, segment_ids, chunk):
        network = tuple(Affine(*(inputs[name] for name in pair)) for pair in names(layers))
        learner = Learner(network, InnerNorm(inputs["ln_scale"], inputs["ln_bias"]), inputs["token_scale"])
        tokens = Tokens(*(inputs[name] for name in ("q", "k", "v", "lr")))
        out, state = chunkwise(tokens, learner, initial_state, segment_ids, window=chunk)
        return jnp.where(segment_ids[..., None, None] >= 0, out, 0), state

    return run


def _record(name, function, widths, **fields):
    layers = len(widths(1)) - 1
    weights = tuple(name for pair in names(layers) for name in pair)
    return Engine(
        name,
        function,
        _chunkwise(layers),
        _drawer(widths),
        row,
        gates=("lr", "token_scale"),
        static=("token_scale", *weights, "ln_scale", "ln_bias"),
        heads={"token_scale": None},
        draw_state=_state_drawer(widths),
        out=_head_keys,
        read=("q", "k", "v", "lr"),
        fresh=_fresh(layers),
        forms=("recurrent", "chunkwise"),
        bad={
            "lr without heads": ("lr", lambda x: x[..., 0]),
            "lr of other length": ("lr", lambda x: x[:, :-1]),
            "integer lr": ("lr", lambda x: x.astype(np.int32)),
            "token_scale for every row": ("token_scale", lambda x: x[None]),
            "empty token_scale": ("token_scale", lambda x: x[:0]),
            "ln_scale for all heads": ("ln_scale", lambda x: x[0]),
            "ln_bias of other width": ("ln_bias", lambda x: x[:, :-1]),
            **{f"{name} without heads": (name, lambda x: x[0]) for name in weights},
            **{f"{name} of other width": (name, lambda x: x[..., :-1]) for name in weights[layers - 1 :]},
            "state of another network": ("initial_state", lambda x: x._replace(weights=x.weights * 2)),
            "state without gradients": ("initial_state", lambda x: x._replace(gathered=())),
            "state of other rows": ("initial_state", lambda x: x._replace(place=x.place[:1])),
            "state with a float place": ("initial_state", lambda x: x._replace(place=x.place.astype(np.float32))),
        },
        **fields,
    )


RECORDS = [
    _record("ttt_linear", ttt_linear, lambda dim: (dim, dim)),
    _record("ttt_mlp", ttt_mlp, lambda dim: (dim, 2 * dim, dim), variant=True),
]
