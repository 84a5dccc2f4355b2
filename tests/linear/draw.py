"""Hard inputs: randn, and gates of every strength."""

import numpy as np


def log_decays(rng, shape, strength):
    """mild: e^g all over (0, 1); weak: e^g near 1; strong: -30 on a fifth of the tokens, between weak ones;
    heavy: e^g from 1e-7 to 1e-3; extreme: -30 everywhere."""
    mild = -np.logaddexp(0, rng.standard_normal(shape))
    weak = -0.01 * np.abs(rng.standard_normal(shape))
    strong = np.where(rng.permuted(np.arange(weak.size) % 5 == 0).reshape(shape), -30, weak)
    g = {
        "mild": mild,
        "weak": weak,
        "strong": strong,
        "heavy": rng.uniform(-16, -7, shape),
        "extreme": np.full(shape, -30),
    }[strength]
    return g.astype(np.float32)


def draw_qkv(rng, sizes):
    dims = (sizes.key_dim, sizes.key_dim, sizes.value_dim)
    return {
        name: rng.standard_normal((sizes.batch, sizes.length, heads, dim), np.float32)
        for name, heads, dim in zip("qkv", sizes.heads, dims, strict=True)
    }


def unit(x):
    """Rows of Euclidean norm 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
