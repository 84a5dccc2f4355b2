"""Softmax attention under a given mask, and its gradients, by the formulas in float64 numpy."""

import numpy as np


def brute_force(mask, q, k, v, do=None, dl=None, scale=None, cap=None, sinks=None):
    """Out and log-sum-exp, and with `do` and `dl` the gradients in q, k, v of sum(out * do) + sum(lse * dl).

    mask: [B, H, T, M], True where query t of head h reads key m. A row of nothing has out 0, lse -inf, no gradients.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    heads, groups = q.shape[2], k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = (np.repeat(x, heads // groups, axis=2) for x in (k, v))
    s = scale * np.einsum("bthk,bmhk->bhtm", q, keys)
    slope = np.full_like(s, scale)
    if cap is not None:
        s, slope = cap * np.tanh(s / cap), scale * (1 - np.tanh(s / cap) ** 2)
    top = np.where(mask, s, -np.inf).max(-1, initial=-np.inf, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    p = np.where(mask, np.exp(np.where(mask, s - top, 0)), 0)
    total = p.sum(-1)
    if sinks is not None:
        total += np.exp(np.asarray(sinks, np.float64)[None, :, None] - top[..., 0])
    empty = total == 0
    total = np.where(empty, 1, total)
    lse = np.where(empty, -np.inf, np.log(total) + top[..., 0])
    p /= total[..., None]
    out = np.einsum("bhtm,bmhv->bthv", p, values)
    if do is None:
        return out, np.moveaxis(lse, 1, 2)
    do = np.asarray(do).astype(np.float64)
    dl = np.zeros(lse.shape) if dl is None else np.moveaxis(np.asarray(dl).astype(np.float64), 2, 1)
    dp = np.einsum("bthv,bmhv->bhtm", do, values)
    ds = p * (dp - (np.einsum("bthv,bthv->bht", do, out) - dl)[..., None]) * slope
    fold = lambda x: x.reshape(*x.shape[:2], groups, -1, x.shape[-1]).sum(3)  # noqa: E731
    dq = np.einsum("bhtm,bmhk->bthk", ds, keys)
    dk, dv = fold(np.einsum("bhtm,bthk->bmhk", ds, q)), fold(np.einsum("bhtm,bthv->bmhv", p, do))
    return (out, np.moveaxis(lse, 1, 2)), (dq, dk, dv)
