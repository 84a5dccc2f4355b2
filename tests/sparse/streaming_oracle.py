"""StreamingLLM token by token: append, evict, rotate all that is left by its place, and read it. Float64 numpy."""

import numpy as np


def rotate(x, positions, base=10_000.0):
    """Half-split rotary embedding of x [..., n, K] at positions [n]."""
    half = x.shape[-1] // 2
    angles = np.asarray(positions)[:, None] * base ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)


def streaming(q, k, v, start, recent, scale=None):
    """Out [B, T, H, V] of the last T tokens, and what the cache holds at last."""
    (batch, length, heads, dim), (keys, groups) = q.shape, k.shape[1:3]
    scale = dim**-0.5 if scale is None else scale
    out = np.zeros((batch, length, heads, v.shape[-1]))
    held = []
    for p in range(keys):
        held.append(p)
        if len(held) > start + recent:
            del held[start]
        t = p - (keys - length)
        if t < 0:
            continue
        for b in range(batch):
            for h in range(heads):
                g = h // (heads // groups)
                key = rotate(k[b, held, g], np.arange(len(held)))
                query = rotate(q[b, t, h][None], [len(held) - 1])[0]
                weights = np.exp(scale * key @ query)
                out[b, t, h] = weights @ v[b, held, g] / weights.sum()
    return out, held
