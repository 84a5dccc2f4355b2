"""Many small positive definite systems at once, known by their products only."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from effattn_jax.typing import Array, Float

Vectors = Float[Array, "*batch K"]


def solve_positive(product: Callable[[Vectors], Vectors], b: Vectors, diagonal: Vectors, iterations: int) -> Vectors:
    """x with A x = b, where `product(p)` is A p, A symmetric positive definite, `diagonal` that of A.

    Gradients are implicit: z = A^-1 dx, db = z, dA = -z x^T, by the same iterations; nothing is kept of them. `product`
    may depend on what is differentiated; derivatives of any order exist.
    """
    scale = jax.lax.stop_gradient(1 / diagonal)
    return jax.lax.custom_linear_solve(
        product, b, lambda product, b: conjugate_gradients(product, b, scale, iterations), symmetric=True
    )


def conjugate_gradients(
    product: Callable[[Vectors], Vectors], b: Vectors, inverse_diagonal: Vectors, iterations: int
) -> Vectors:
    """Hestenes & Stiefel 1952 with the diagonal as preconditioner, in b's dtype, from b / diagonal."""
    dot = lambda a, b: jnp.sum(a * b, -1, keepdims=True)  # noqa: E731
    # A residual of zero stays zero: the system is solved.
    ratio = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)  # noqa: E731

    def step(_: int, carry: tuple[Vectors, ...]) -> tuple[Vectors, ...]:
        x, residual, direction, size = carry
        along = product(direction)
        alpha = ratio(size, dot(direction, along))
        x, residual = x + alpha * direction, residual - alpha * along
        z = inverse_diagonal * residual
        new_size = dot(residual, z)
        return x, residual, z + ratio(new_size, size) * direction, new_size

    x = inverse_diagonal * b
    residual = b - product(x)
    z = inverse_diagonal * residual
    return jax.lax.fori_loop(0, iterations, step, (x, residual, z, dot(residual, z)))[0]
