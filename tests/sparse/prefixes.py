"""Every token of a row as the newest token of a row of its own, for mechanisms that read one query a row."""

import jax.numpy as jnp
import numpy as np


def as_rows(q, k, v):
    """q [B T, 1, H, K], k and v [B T, T, G, .], and how many of them each row has: 1, ..., T."""
    batch, length = q.shape[:2]
    repeated = (jnp.repeat(x, length, axis=0) for x in (k, v))
    return q.reshape(batch * length, 1, *q.shape[2:]), *repeated, np.tile(np.arange(1, length + 1), batch)


def from_rows(out, q):
    """[B T, 1, H, V] -> [B, T, H, V]"""
    return out.reshape(*q.shape[:3], -1)
