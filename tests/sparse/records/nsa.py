"""Native sparse attention with means for compression and gates made of the queries."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax.sparse.nsa import KV, nsa
from effattn_jax.sparse.nsa_cache import cached_nsa, init_nsa_cache
from tests.sparse.mechanism import Mechanism
from tests.sparse.token_by_token import token_by_token

SIZES = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8}


def softmax(s):
    e = np.exp(s - np.max(s))
    return e / e.sum()


def compressed(x, position, kernel, stride):
    """Means of the windows of x [M, ...] that end at `position` or before."""
    return [x[c : c + kernel].mean(0) for c in range(0, position + 2 - kernel, stride)]


def scores(p, keys, kernel, stride, block_size):
    """Strides that each window has in common with each block, by counting tokens, times its weight."""
    result = np.zeros(-(-keys // block_size))
    for c, j in np.ndindex(len(p), len(result)):
        window, block = range(c * stride, c * stride + kernel), range(j * block_size, (j + 1) * block_size)
        result[j] += p[c] * len(set(window) & set(block)) / stride
    return result


def choose(score, own, topk, init_blocks, local_blocks):
    forced = {j for j in range(own + 1) if j < init_blocks or own - j < local_blocks}
    free = sorted(set(range(own + 1)) - forced, key=lambda j: (-score[j], j))
    return sorted([*forced, *free[: topk - len(forced)]])


def branches(q, cmp, slc, win, *, topk, init_blocks, local_blocks, window, kernel_size, kernel_stride, block_size):
    """[3, B, T, H, V] of the three branches, each with keys and values of its own; and the lists."""
    (batch, length, heads, key_dim), (keys, groups) = q.shape, slc[0].shape[1:3]
    outs, lists = np.zeros((3, batch, length, heads, slc[1].shape[3])), {}
    for b, g, t in np.ndindex(batch, groups, length):
        position = keys - length + t
        of_group = range(g * heads // groups, (g + 1) * heads // groups)
        k, v = (compressed(x[b, :, g], position, kernel_size, kernel_stride) for x in cmp)
        total = np.zeros(len(k))
        for h in of_group if k else ():
            p = softmax(q[b, t, h] @ np.array(k).T / np.sqrt(key_dim))
            outs[0, b, t, h] = p @ np.array(v)
            total += p
        score = scores(total, keys, kernel_size, kernel_stride, block_size)
        chosen = choose(score, position // block_size, topk, init_blocks, local_blocks)
        lists[b, g, t] = chosen
        read = [i for j in chosen for i in range(j * block_size, (j + 1) * block_size) if i <= position]
        near = list(range(max(0, position - window + 1), position + 1))
        for n, (tokens, (k, v)) in enumerate([(read, slc), (near, win)], 1):
            for h in of_group:
                p = softmax(q[b, t, h] @ k[b, tokens, g].T / np.sqrt(key_dim))
                outs[n, b, t, h] = p @ v[b, tokens, g]
    return outs, lists


def gates(q):
    return 1 / (1 + np.exp(-np.asarray(q[..., :3])))


def _oracle(q, k, v, **options):
    outs, _ = branches(q, (k, v), (k, v), (k, v), **SIZES, **options)
    return np.einsum("nbthv,bthn->bthv", outs, gates(q))


def _run(q, k, v, segment_ids=None, only=None, **options):
    clean = q if segment_ids is None else jnp.where(segment_ids[:, -q.shape[1] :, None, None] < 0, 0, q)
    factors = jax.nn.sigmoid(clean[..., :3])  # padding holds NaN
    if only is not None:
        factors = jnp.broadcast_to(np.eye(3, dtype=q.dtype)[only], factors.shape)
    kv = KV(k, v)
    return nsa(q, kv, kv, kv, factors, segment_ids=segment_ids, **SIZES, **options)


def _decode(q, k, v, window, **options):
    def step(q, k, v, cache):
        kv = KV(k, v)
        return cached_nsa(q, kv, kv, kv, jax.nn.sigmoid(q[..., :3]), cache, window=window, **SIZES, **options)

    windows = {name: SIZES[name] for name in ("kernel_size", "kernel_stride")}
    cache = init_nsa_cache(*k.shape, v.shape[3], window=window, dtype=k.dtype, **windows)
    return token_by_token(step, cache, q, k, v)


OPTIONS = {"topk": 3, "init_blocks": 1, "local_blocks": 1, "window": 5}

RECORDS = [
    Mechanism(
        "nsa",
        partial(_run, **OPTIONS),
        oracle=partial(_oracle, **OPTIONS),
        decode=partial(_decode, **OPTIONS),
        dense=partial(_run, only=1, **OPTIONS | {"topk": 100}),
        lengths=(1, 4, 9, 47),
    )
]
