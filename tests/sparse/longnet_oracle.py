"""LongNet as a softmax with multiplicity, a pair of tokens at a time, float64 numpy."""

import math

import numpy as np


def branches(length, keys, head, heads, segments, ratios, causal=True, modulo=False):
    """[branches, T, M], whether query t meets key j in each."""
    meet = np.zeros((len(segments), length, keys), bool)
    for m, (w, r) in enumerate(zip(segments, ratios, strict=True)):
        phase = head % r if modulo else head // math.ceil(heads / r)
        for t in range(length):
            i = keys - length + t
            for j in range(keys):
                kept = (i % w) % r == phase and (j % w) % r == phase
                meet[m, t, j] = i // w == j // w and kept and (j <= i or not causal)
    return meet


def longnet(q, k, v, segments, ratios, causal=True, modulo=False, scale=None, alpha=None):
    """out, of the given weights of the branches [B, T, H, branches] if there are any."""
    (batch, length, heads, dim), (keys, groups) = q.shape, k.shape[1:3]
    scale = dim**-0.5 if scale is None else scale
    out = np.zeros((batch, length, heads, v.shape[-1]))
    for h in range(heads):
        meet = branches(length, keys, h, heads, segments, ratios, causal, modulo)
        for b in range(batch):
            key, value = k[b, :, h // (heads // groups)], v[b, :, h // (heads // groups)]
            weights = meet * np.exp(scale * q[b, :, h] @ key.T)
            for t in range(length):
                of_branch = weights[:, t]
                if alpha is None:
                    out[b, t, h] = of_branch.sum(0) @ value / of_branch.sum()
                else:
                    for m in np.flatnonzero(of_branch.sum(1)):
                        out[b, t, h] += alpha[b, t, h, m] * (of_branch[m] @ value) / of_branch[m].sum()
    return out


def branch_weights(q, k, segments, ratios, scale=None, **options):
    """[B, T, H, branches]: e^{L_m} / sum_m e^{L_m}."""
    (batch, length, heads, dim), (keys, groups) = q.shape, k.shape[1:3]
    scale = dim**-0.5 if scale is None else scale
    alpha = np.zeros((batch, length, heads, len(segments)))
    for h in range(heads):
        meet = branches(length, keys, h, heads, segments, ratios, **options)
        for b in range(batch):
            total = (meet * np.exp(scale * q[b, :, h] @ k[b, :, h // (heads // groups)].T)).sum(-1)
            alpha[b, :, h] = (total / total.sum(0)).T
    return alpha
