"""Log-linear attention, after some tokens that the initial state has seen."""

import jax.numpy as jnp
import numpy as np

from effattn_jax.linear.fenwick import occupied
from effattn_jax.linear.log_linear import LogLinearState, chunkwise, log_linear_attention
from tests.linear.draw import draw_qkv, log_decays
from tests.linear.suite import Engine

BEFORE = 40  # tokens of an initial state, at most


def _slots(sizes):
    """Enough for the tokens and those before them."""
    return (sizes.length + BEFORE).bit_length() + 1


def _draw(rng, sizes, strength):
    shape = (sizes.batch, sizes.length, max(sizes.heads))
    scales = np.logaddexp(0, rng.standard_normal((*shape, _slots(sizes)), np.float32))
    return draw_qkv(rng, sizes) | {"log_decay": log_decays(rng, shape, strength), "level_scales": scales}


def _draw_state(rng, sizes):
    """Rows that have seen different numbers of tokens."""
    shape = (sizes.batch, max(sizes.heads), _slots(sizes), sizes.key_dim, sizes.value_dim)
    levels = rng.standard_normal(shape, np.float32)
    count = rng.integers(0, BEFORE, sizes.batch, np.int32)
    return LogLinearState(levels * np.asarray(occupied(count, shape[2]))[:, None, :, None, None], count)


def _chunkwise(inputs, initial_state, segment_ids, chunk):
    arguments = (inputs[name] for name in ("q", "k", "v", "log_decay", "level_scales"))
    levels, count = initial_state
    held = occupied(count, levels.shape[2])[:, None, :, None, None]
    state = LogLinearState(jnp.where(held, levels, 0), count)  # as `log_linear_attention` does before it
    out, state = chunkwise(*arguments, state, segment_ids, chunk=chunk)
    return out * inputs["q"].shape[-1] ** -0.5, state


def _row(inputs, state):
    """The sum over all earlier tokens and over the blocks before them, at the levels of their indices."""
    levels, before = state[0], int(state[1])
    heads, slots, key_dim, _ = levels.shape
    length = len(inputs["q"])
    digits = lambda x: np.frexp(x.astype(np.float64))[1]  # noqa: E731  # of a whole number in base two
    blocks = [b for b in range(slots - 1) if before >> b & 1] + [slots - 1] * (before >= 2 ** (slots - 1))
    member = np.array([before >> b + 1 << b + 1 if b < slots - 1 else 2**40 for b in blocks], int)
    index = np.concatenate([member, before + np.arange(length)])
    after, out = np.zeros_like(levels), np.zeros((length, heads, levels.shape[-1]))
    for head in range(heads):
        q, k, v = (inputs[name][:, head // (heads // inputs[name].shape[1])] for name in "qkv")
        total = np.concatenate([np.zeros(len(blocks)), np.cumsum(inputs["log_decay"][:, head])])
        for t in range(length):
            seen = slice(len(blocks) + t + 1)
            scales = inputs["level_scales"][t, head, np.minimum(digits(index[seen] ^ (before + t)), slots - 1)]
            weights = scales * np.exp(total[len(blocks) + t] - total[seen])
            scores = weights[len(blocks) :] * (k[: t + 1] @ q[t])
            out[t, head] = scores @ v[: t + 1]
            for weight, b in zip(weights, blocks, strict=False):
                out[t, head] += weight * (levels[head, b].T @ q[t])
        to = np.minimum(digits(index ^ (before + length)) - 1, slots - 1)
        kept = np.exp(total[-1] - total) if len(total) else total
        for n, b in enumerate(blocks):
            after[head, to[n]] += kept[n] * levels[head, b]
        for t in range(length):
            after[head, to[len(blocks) + t]] += kept[len(blocks) + t] * np.outer(k[t], v[t])
    return out * key_dim**-0.5, LogLinearState(after, np.float64(before + length))


RECORDS = [
    Engine(
        "log_linear",
        log_linear_attention,
        _chunkwise,
        _draw,
        _row,
        gates=("log_decay", "level_scales"),
        draw_state=_draw_state,
        groups=((2, 2, 4), (1, 1, 4)),
        bad={
            "too few levels": ("level_scales", lambda x: x[..., :7]),
            "level_scales of other length": ("level_scales", lambda x: x[:, :-1]),
            "integer level_scales": ("level_scales", lambda x: x.astype(np.int32)),
            "log_decay of other heads": ("log_decay", lambda x: x[:, :, :-1]),
        },
    )
]
