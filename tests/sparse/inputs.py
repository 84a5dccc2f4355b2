"""Hard inputs for softmax attention, and loss gradients through out and log-sum-exp."""

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax.sparse import attention, cached_attention

STATIC = ("causal", "window", "scale", "logits_soft_cap", "implementation", "return_lse")
attend = jax.jit(attention, static_argnames=STATIC)
attend_cached = jax.jit(cached_attention, static_argnames=STATIC[1:5])


def randn(seed, *shapes, dtype=jnp.float32):
    """Numpy arrays: cutting and joining them compiles nothing."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def qkv(length, keys=None, *, batch=2, heads=4, kv_heads=2, key_dim=16, value_dim=16, dtype=jnp.float32, seed=0):
    keys = length if keys is None else keys
    shapes = (batch, length, heads, key_dim), (batch, keys, kv_heads, key_dim), (batch, keys, kv_heads, value_dim)
    q, k, v = randn(seed, *shapes, dtype=dtype)
    return q + q, k, v  # sharper than the softmax of unit logits


def sink_logits(heads=4):
    return np.resize(np.array([-5, 0, 5, 30], np.float32), heads)


def documents(length, batch=2):
    """Rows with one-token documents, documents over many blocks and padding at both ends and in the middle."""
    rows = []
    for row in range(batch):
        ends = sorted({1, 2, length // 5 + row, length // 2, length // 2 + 1, length - 1 - row, length})
        ids = np.searchsorted(ends, np.arange(length), side="right")
        ids[length // 3 : length // 3 + 2 + row] = -1
        ids[: 3 * row] = -1 - row
        if length > 8:
            ids[length - 2 :] = -7
        rows.append(ids)
    return np.stack(rows).astype(np.int32)


def value_and_gradients(implementation, q, k, v, sinks=None, **options):
    """(out, lse) and the gradients in q, k, v (and sinks) of sum(out * do) + sum(lse * dl), rows without keys apart."""
    rows = q.shape[:3]
    do, dl = randn(1, (*rows, v.shape[-1]), rows, dtype=jnp.promote_types(q.dtype, jnp.float32))

    def loss(arrays):
        *qkv, sinks = arrays
        out, lse = attention(*qkv, sinks=sinks, implementation=implementation, return_lse=True, **options)
        lse = jnp.where(jnp.isneginf(lse), 0, lse)
        return jnp.sum(out * do) + jnp.sum(lse * dl), (out, lse)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))((q, k, v, sinks))
    return outputs, gradients
