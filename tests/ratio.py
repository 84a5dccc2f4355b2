"""The one measure of error: rms(reference - x) / (rms(reference) + 1e-8). NaN never passes."""

import jax
import jax.numpy as jnp
import numpy as np

FLOAT32 = 1e-5  # float32 forms against each other
BFLOAT16_OUT, BFLOAT16_GRAD, BFLOAT16_GATE = 0.005, 0.008, 0.02


def error_ratio(reference, x) -> float:
    reference, x = (np.asarray(a).astype(np.float64) for a in (reference, x))
    assert reference.shape == x.shape, f"shapes differ: reference {reference.shape}, got {x.shape}"
    if reference.size == 0:
        return 0.0
    rms = lambda a: float(np.sqrt(np.mean(np.square(a))))  # noqa: E731
    return rms(reference - x) / (rms(reference) + 1e-8)


def assert_close(reference, x, limit: float, name: str = "") -> None:
    """Every leaf of `x` is finite and within `limit` of the same leaf of `reference`."""
    references, tree = jax.tree_util.tree_flatten_with_path(reference)
    leaves = jax.tree.leaves(x)
    assert len(references) == len(leaves), f"{name}: structures differ: {tree}"
    for (path, want), got in zip(references, leaves, strict=True):
        label = name + jax.tree_util.keystr(path)
        assert bool(jnp.all(jnp.isfinite(got))), f"{label}: not finite"
        ratio = error_ratio(want, got)
        assert ratio <= limit, f"{label}: error ratio {ratio:.2e} > {limit:.0e}"
