"""Five Newton-Schulz steps towards the nearest orthogonal matrix: what ATLAS does to the momentum of its memory.

Behrouz et al. 2025, arXiv:2505.23735, with the coefficients of Muon (Jordan 2024). They trade exactness for speed:
singular values end between about 0.7 and 1.2, not at 1.
"""

import jax.numpy as jnp

from effattn_jax.precision import contract
from effattn_jax.typing import Array, Float

A, B, C = 3.4445, -4.7750, 2.0315


def newton_schulz(matrix: Float[Array, "... M N"], *, steps: int = 5, eps: float = 1e-7) -> Float[Array, "... M N"]:
    """X <- a X + (b X X^T + c (X X^T)^2) X, from X = matrix / (|matrix|_F + eps), on the shorter side."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = jnp.swapaxes(matrix, -1, -2) if tall else matrix
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + eps)
    for _ in range(steps):
        gram = contract("...ik,...jk->...ij", x, x)
        x = A * x + contract("...ij,...jk->...ik", B * gram + C * contract("...ij,...jk->...ik", gram, gram), x)
    return jnp.swapaxes(x, -1, -2) if tall else x
